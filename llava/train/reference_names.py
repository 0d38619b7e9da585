"""The names that forks of LLaVA import from `llava.train.train`, over this package's own functions."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from llava import conversation
from llava.errors import LlavaError
from llava.tokenization import ImageTokens, encode_conversation
from llava.train.arguments import DataArguments, LlavaTrainingArguments, ModelArguments

TrainingArguments = LlavaTrainingArguments

__all__ = [
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "LazySupervisedDataset",
    "ModelArguments",
    "TrainingArguments",
    "preprocess",
    "preprocess_multimodal",
]


def preprocess(
    sources: Sequence[Sequence[dict[str, Any]]], tokenizer: Any, has_image: bool = False
) -> dict[str, list[torch.Tensor]]:
    """Ids and labels of conversations, rendered with `llava.conversation.default_conversation`.

    Args:
        sources: lists of turns, {"from": "human" or "gpt", "value": text}, after `preprocess_multimodal`.
        has_image: decides nothing: each `<image>` becomes one IMAGE_TOKEN_INDEX.

    Returns:
        `input_ids` and `labels`, lists of int64 `[length]`.
    """
    samples = [encode_conversation(list(turns), conversation.default_conversation, tokenizer) for turns in sources]
    return {
        "input_ids": [torch.tensor(sample.input_ids) for sample in samples],
        "labels": [torch.tensor(sample.labels) for sample in samples],
    }


def preprocess_multimodal(sources: Sequence[Sequence[dict[str, Any]]], data_args: Any) -> Any:
    """The turns with each `<image>` where the template has it, `<im_start>` and `<im_end>` around it if the data's
    arguments say `mm_use_im_start_end`; changed in place and given back, as LLaVA's does."""
    if not data_args.is_multimodal:
        return sources
    tokens = ImageTokens(use_start_end=bool(getattr(data_args, "mm_use_im_start_end", False)))
    template = conversation.default_conversation
    for turns in sources:
        for turn in turns:
            turn["value"] = template.place_images(turn["value"]).replace("<image>", tokens.text)
    return sources


class LazySupervisedDataset:
    """LLaVA's dataset; here it is `llava.train.data.dataset.LlavaDataset`."""

    def __init__(self, *_: Any, **__: Any):
        _refuse("LazySupervisedDataset", "llava.train.data.dataset.LlavaDataset over open_records(path)")


class DataCollatorForSupervisedDataset:
    """LLaVA's collator; here it is `llava.train.data.collator.Collator`."""

    def __init__(self, *_: Any, **__: Any):
        _refuse("DataCollatorForSupervisedDataset", "llava.train.data.collator.Collator")


def _refuse(name: str, replacement: str) -> NoReturn:
    raise LlavaError(f"{name} doesn't exist here; use {replacement}, or train(argv) for a whole run")
