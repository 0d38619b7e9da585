"""Ids as arrays: one position per image feature, cut to a length, padded to a batch. numpy only."""

from collections.abc import Sequence
from typing import overload

import numpy as np

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError, amount

TokenIds = Sequence[int] | np.ndarray


@overload
def expand_images(
    input_ids: TokenIds, labels: TokenIds, features_per_image: int | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]: ...


@overload
def expand_images(
    input_ids: TokenIds, labels: None, features_per_image: int | Sequence[int]
) -> tuple[np.ndarray, None]: ...


def expand_images(
    input_ids: TokenIds,
    labels: TokenIds | None,
    features_per_image: int | Sequence[int],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Repeat each IMAGE_TOKEN_INDEX as often as its image has features.

    Args:
        input_ids: int [length], one IMAGE_TOKEN_INDEX per image.
        labels: int [length] or None; an image's positions get its label, which is never a target.
        features_per_image: one number for all images, or one for each.

    Returns:
        (input_ids, labels), int64 [length - images + features].

    Raises:
        LlavaError: as many numbers as images are needed.
    """
    ids = np.asarray(input_ids, np.int64)
    places = np.flatnonzero(ids == IMAGE_TOKEN_INDEX)
    features = np.asarray(features_per_image, np.int64)
    if features.ndim and len(features) != len(places):
        raise LlavaError(
            f"the text has {len(places)} <image> for {amount(len(features), 'image')}; "
            f"each image needs its <image> in the text"
        )
    repeats = np.ones(len(ids), np.int64)
    repeats[places] = features
    expanded = None if labels is None else np.repeat(np.asarray(labels, np.int64), repeats)
    return np.repeat(ids, repeats), expanded


def truncate(input_ids: np.ndarray, labels: np.ndarray, max_length: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """(input_ids, labels, number of positions cut off), cut from the end."""
    cut = 0 if max_length is None else max(0, len(input_ids) - max_length)
    return (input_ids[:max_length], labels[:max_length], cut) if cut else (input_ids, labels, 0)


def pad_batch(
    samples: Sequence[tuple[TokenIds, TokenIds]],
    pad_token_id: int,
    *,
    side: str = "right",
    max_length: int | None = None,
) -> dict[str, np.ndarray]:
    """Pad (input_ids, labels) pairs to the longest, cut to `max_length` first.

    Returns:
        `input_ids` (padding `pad_token_id`), `labels` (padding IGNORE_INDEX), `attention_mask` (bool),
        each [batch, longest], the first two int64.
    """
    cut = [(list(ids)[:max_length], list(labels)[:max_length]) for ids, labels in samples]
    shape = (len(cut), max((len(ids) for ids, _ in cut), default=0))
    batch = {
        "input_ids": np.full(shape, pad_token_id, np.int64),
        "labels": np.full(shape, IGNORE_INDEX, np.int64),
        "attention_mask": np.zeros(shape, bool),
    }
    for row, (ids, labels) in enumerate(cut):
        place = slice(0, len(ids)) if side == "right" else slice(shape[1] - len(ids), shape[1])
        batch["input_ids"][row, place] = ids
        batch["labels"][row, place] = labels
        batch["attention_mask"][row, place] = True
    return batch
