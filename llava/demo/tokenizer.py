"""A small tokenizer in the manner of LLaMA's: byte-fallback BPE, so that any text can be said."""

import json
from collections.abc import Iterable
from pathlib import Path

LEARNED = 500
"""Tokens beside the special ones and the bytes: the words of the built-in set, about."""


def make_tokenizer(texts: Iterable[str], folder: str | Path) -> None:
    """Learn a tokenizer from texts and write it to `folder` (<unk> 0, <s> 1, </s> 2, then 256 bytes)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    first = special + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    trainer = trainers.BpeTrainer(vocab_size=LEARNED, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    learned = content["model"]["vocab"]
    # Byte tokens come right after the special ones, as in LLaMA's vocabulary.
    ordered = first + [token for token in sorted(learned, key=learned.get) if token not in first]
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
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=1024,
        padding_side="right",
    )
    fast.save_pretrained(folder)
