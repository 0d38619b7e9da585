"""Loading a checkpoint's tokenizer, and adding the picture tokens to one."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava.errors import LlavaError


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token.

    Raises:
        LlavaError: the folder holds no tokenizer, or one that can't be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise LlavaError(
            f"{folder}: no tokenizer found (looked for tokenizer.json and tokenizer.model); copy the "
            f"tokenizer's files of the base model there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise LlavaError(f"{folder}: the tokenizer can't be read ({reason})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
