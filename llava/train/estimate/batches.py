"""Full batches of random records, where a recipe's own are not at hand."""

import numpy as np
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model import LoadedModel
from llava.train.arguments import Arguments
from llava.train.data.dataset import Report, Sample

MEAN_TEXT, DEVIATION = 300.0, 250.0
"""Tokens of text of a sample, where packs are filled from many (llava's own instruction data has about as many)."""
SHARE_OF_TARGETS = 2 / 3
IMAGE_AT = 4
"""Tokens before an image."""


def text_lengths(random: np.random.Generator, count: int) -> np.ndarray:
    """Tokens of text of `count` samples, log-normal."""
    variance = np.log(1 + (DEVIATION / MEAN_TEXT) ** 2)
    return random.lognormal(np.log(MEAN_TEXT) - variance / 2, np.sqrt(variance), count).clip(20, None)


def typical_share(patches: int, longest: int, at_once: int, packed: bool) -> float:
    """Tokens (with padding) of a batch of usual lengths over those of one whose samples are as long as allowed."""
    lengths = (text_lengths(np.random.default_rng(1), 1000 * at_once) + patches).clip(None, longest)
    batches = lengths.reshape(-1, at_once)
    taken = batches.sum(1) if packed else batches.max(1) * at_once
    return float(taken.mean() / (longest * at_once))


class RandomRecords(Dataset):
    """Samples of one image each and random text.

    Where batches are filled up to a number of tokens lengths are log-normal; else every sample is as long as
    `--model_max_length` allows, so that the batch is the largest there can be.
    """

    def __init__(self, arguments: Arguments, loaded: LoadedModel, count: int):
        self.report = Report()
        self.tower = loaded.model.get_vision_tower()
        self.patches = loaded.model.num_patches
        self.vocabulary = len(loaded.tokenizer)
        longest = arguments.training.model_max_length
        self.random = np.random.default_rng(0)
        if arguments.data.max_tokens_per_batch:
            longest = min(longest, arguments.data.max_tokens_per_batch)
            text = text_lengths(self.random, count)
            self._lengths = (text + self.patches).clip(None, longest).astype(np.int64)
        else:
            self._lengths = np.full(count, max(longest, self.patches + 2))
        self.longest = longest

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, number: int) -> dict:
        length = int(self._lengths[number])
        ids = self.random.integers(0, self.vocabulary, length).astype(np.int32)
        text = length - self.patches
        labels = np.where(np.arange(length) < length - text * SHARE_OF_TARGETS, IGNORE_INDEX, ids).astype(np.int32)
        start = min(IMAGE_AT, text)
        ids[start : start + self.patches] = IMAGE_TOKEN_INDEX
        labels[start : start + self.patches] = IGNORE_INDEX
        size = self.tower.image_size
        sample = Sample(ids, labels, ["random"], False)
        pixels = np.zeros((1, 3, size, size), np.float32)
        return {"number": number, "sample": sample, "skipped": None, "pixel_values": pixels}

    def lengths(self) -> np.ndarray:
        return self._lengths

    def has_image(self) -> np.ndarray:
        return np.ones(len(self), bool)

    def describe(self, number: int) -> str:
        return f"random record {number}"
