"""A small tokenizer in the manner of LLaMA's: byte-fallback BPE, so that any text can be said.

As in Mistral's later ones, the marks of a turn are one token each; with the space before them, prompts get shorter.

python -m llava.demo.tokenizer --data-path text.json --output-dir tokenizer
"""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from llava.commandline import ArgumentParser, run
from llava.folders import check_target, stage_files

MARKS = ("[INST]", "[/INST]")

LEARNED = 500
"""Tokens to learn, the three special ones among them: about the words of the built-in set."""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data-path", action="append", required=True, help="records to learn from; may be repeated")
    parser.add_argument("--output-dir", required=True, help="folder of the tokenizer")
    parser.add_argument("--learned", type=int, default=LEARNED, help="tokens to learn, with the three special ones")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_target(args.output_dir, args.overwrite)
    make_tokenizer(texts_of(args.data_path), args.output_dir, args.learned)


def texts_of(paths: Iterable[str | Path], limit: int | None = None) -> list[str]:
    """What is said in records (in the first `limit` of each file), and how a prompt is written."""
    from llava.constants import DEFAULT_IMAGE_TOKEN
    from llava.errors import LlavaError
    from llava.record_content import read_turns
    from llava.records import iter_records

    texts = ["Describe the picture. Please answer: yes, no."] * 10
    for path in paths:
        for number, record in enumerate(islice(iter_records(path), limit)):
            try:
                texts += [turn.text.replace(DEFAULT_IMAGE_TOKEN, "") for turn in read_turns(record)]
            except LlavaError as error:
                raise LlavaError(f"{path} record {number}: {error}") from error
    return texts


def make_tokenizer(texts: Iterable[str], folder: str | Path, learned: int = LEARNED) -> None:
    """Learn a tokenizer from texts and write it to `folder` (<unk> 0, <s> 1, </s> 2, then 256 bytes)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    first = special + [f"<0x{byte:02X}>" for byte in range(256)] + list(MARKS)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    trainer = trainers.BpeTrainer(vocab_size=learned, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    found = content["model"]["vocab"]
    # Byte tokens come right after the special ones, as in LLaMA's vocabulary.
    ordered = first + [token for token in sorted(found, key=found.get) if token not in first]
    content["model"]["vocab"] = {token: index for index, token in enumerate(ordered)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    marks = [AddedToken(mark, lstrip=True, normalized=False, special=True) for mark in ("</s>", *MARKS)]
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=1024,
        padding_side="right",
    )
    with stage_files(folder, last="tokenizer.json") as part:
        fast.save_pretrained(part)


if __name__ == "__main__":
    run(main)
