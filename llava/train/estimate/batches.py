"""Batches of a recipe's lengths: samples with random text, and images without content."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model import LoadedModel
from llava.train.arguments import Arguments
from llava.train.data.dataset import Report, Sample
from llava.train.estimate.inputs.lengths import Lengths
from llava.train.step.packing import fill_batches

SHARE_OF_TARGETS = 2 / 3
IMAGE_AT = 4
"""Tokens before an image."""


@dataclass(frozen=True)
class Batches:
    """What a step is simulated with, and how a usual one compares.

    Attributes:
        samples: the dataset.
        share: tokens (with padding) of a usual micro-batch over those of a simulated one.
        at_once: samples of a usual micro-batch.
    """

    samples: "StandIns"
    share: float
    at_once: float


def batches_of(arguments: Arguments, loaded: LoadedModel, lengths: Lengths, count: int) -> Batches:
    """At least `count` micro-batches: packs as they are filled, else the largest there can be.

    Of data that were read the largest holds their longest samples, of random records samples of `--model_max_length`.
    """
    training, data = arguments.training, arguments.data
    make: Callable = StandIns.of(loaded)
    if data.max_tokens_per_batch:
        positions = lengths.positions.clip(None, data.max_tokens_per_batch)
        groups = fill_batches(positions, data.max_tokens_per_batch, training.seed)
        times = -(-count // len(groups))
        return Batches(make(np.tile(positions, times), np.tile(lengths.tiles, times)), 1.0,
                       len(positions) / len(groups))  # fmt: skip
    at_once = training.per_device_train_batch_size
    if lengths.are_read:
        order = np.argsort(-lengths.positions)[:at_once]
        largest, tiles = lengths.positions[order], lengths.tiles[order]
    else:
        images = int(lengths.tiles[0])
        largest = np.full(1, max(training.model_max_length, images * loaded.model.num_patches + 2))
        tiles = np.full(1, images)
    times = -(-count * at_once // len(largest))
    joined = data.packing or training.group_by_modality_length or training.train_sampling_strategy == "group_by_length"
    usual = _usual_tokens(lengths.positions, at_once, joined)
    full = largest.max() * at_once if not data.packing else largest.mean() * at_once
    return Batches(make(np.tile(largest, times), np.tile(tiles, times)), float(usual / full), at_once)


def _usual_tokens(positions: np.ndarray, at_once: int, joined: bool) -> float:
    """Tokens of a micro-batch on average: with padding to the longest, unless samples are joined or of like length."""
    random = np.random.default_rng(1)
    drawn = random.choice(positions, (1000, at_once))
    return float((drawn.sum(1) if joined else drawn.max(1) * at_once).mean())


class StandIns(Dataset):
    """Samples of given lengths, with random text and images without content."""

    def __init__(self, positions: np.ndarray, tiles: np.ndarray, patches: int, vocabulary: int, image_size: int):
        self.report = Report()
        self.positions, self.tiles, self.patches, self.image_size = positions, tiles, patches, image_size
        self.vocabulary = vocabulary
        self.random = np.random.default_rng(0)

    @classmethod
    def of(cls, loaded: LoadedModel) -> Callable[[np.ndarray, np.ndarray], "StandIns"]:
        """Makes samples for a model, of positions and tiles, int64 [samples] each."""
        model = loaded.model
        size = model.get_vision_tower().image_size
        return lambda positions, tiles: cls(positions, tiles, model.num_patches, len(loaded.tokenizer), size)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> dict:
        length, tiles = int(self.positions[number]), int(self.tiles[number])
        images = tiles * self.patches
        ids = self.random.integers(0, self.vocabulary, length).astype(np.int32)
        text = length - images
        labels = np.where(np.arange(length) < length - text * SHARE_OF_TARGETS, IGNORE_INDEX, ids).astype(np.int32)
        start = min(IMAGE_AT, text)
        ids[start : start + images] = IMAGE_TOKEN_INDEX
        labels[start : start + images] = IGNORE_INDEX
        item = {"number": number, "sample": Sample(ids, labels, ["image"] * tiles, False), "skipped": None}
        if tiles:
            item["pixel_values"] = np.zeros((tiles, 3, self.image_size, self.image_size), np.float32)
        return item

    def items(self, numbers: Iterable[int]) -> list[dict]:
        return [self[number] for number in numbers]

    def sample_if_readable(self, number: int) -> Sample:
        return self[number]["sample"]

    def lengths(self) -> np.ndarray:
        return self.positions

    def has_image(self) -> np.ndarray:
        return self.tiles > 0

    def describe(self, number: int) -> str:
        return f"record {number}"
