"""Training samples: a record's conversation as ids and labels, its images as pixel values or stored features.

Ids are expanded here (one IMAGE_TOKEN_INDEX per feature), so every length is known before an image is decoded.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from llava.bars import tqdm
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import ImageError, LlavaError
from llava.folders import other_form_note
from llava.record_content import image_key, record_images
from llava.records import Record
from llava.tokenization import Encoded
from llava.train.data.image_source import ImageSource
from llava.train.data.lengths import load_lengths, save_lengths
from llava.train.data.record_store import RecordStore, describe

logger = logging.getLogger(__name__)

EAGER_LIMIT = 50_000
"""Files with at most this many records are tokenised before training starts; larger ones record by record."""


@dataclass
class Sample:
    """A tokenised record: `input_ids` and `labels` int32 [length], expanded; `images` as the record has them.

    `dropped_turns` are answers that no question comes before.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: list[Any]
    truncated: bool
    dropped_turns: int = 0

    @property
    def has_target(self) -> bool:
        # The first label has nothing before it that could predict it.
        return bool((self.labels[1:] != IGNORE_INDEX).any())


@dataclass
class Report:
    """What was cut or left out: sample numbers, so that a sample seen twice counts once."""

    truncated: set[int] = field(default_factory=set)
    targetless: set[int] = field(default_factory=set)
    dropped_turns: set[int] = field(default_factory=set)
    skipped: dict[int, str] = field(default_factory=dict)

    def note(self, number: int, sample: Sample) -> None:
        """Keep what is to be said of a sample."""
        if sample.truncated:
            self.truncated.add(number)
        if not sample.has_target:
            self.targetless.add(number)
        if sample.dropped_turns:
            self.dropped_turns.add(number)

    def add(self, other: "Report") -> None:
        """What another report says, too."""
        for item in fields(self):
            getattr(self, item.name).update(getattr(other, item.name))

    def add_batch(self, batch: "Report") -> None:
        """What a batch's report says; what it leaves out for the first time is logged."""
        for number, message in batch.skipped.items():
            if number not in self.skipped:
                logger.warning("left out: %s", message)
        self.add(batch)


class LlavaDataset(Dataset):
    """Samples by number.

    Args:
        store: the records.
        encode: `encode(record, features of each image) -> Encoded` (llava.tokenization), expanded, not cut.
        image_source: where images are found.
        load_image: `load_image(path or bytes) -> float32 [tiles, 3, H, W]`.
        count_features: `count_features(image) -> positions` that a record's image takes.
        max_length: longest sample in positions; longer ones are cut from the end.
        lazy: tokenise when needed; None decides by the number of records.
        skip_unreadable: leave out records whose image is missing or unreadable (counted in `report`), in place of an
            error; what is wrong with the settings, or with a record's turns, stays one.
        lengths_path: file to keep the samples' lengths in, for lazy datasets that need them.
        feature_row: `feature_row(image) -> row` of stored tower features; then no image is opened here.
    """

    def __init__(
        self,
        store: RecordStore,
        encode: Callable[[Record, list[int]], Encoded],
        image_source: ImageSource,
        load_image: Callable[[Any], np.ndarray],
        *,
        count_features: Callable[[Any], int],
        max_length: int,
        lazy: bool | None = None,
        skip_unreadable: bool = False,
        feature_row: Callable[[Any], int] | None = None,
        lengths_path: Path | None = None,
        show_progress: bool = True,
    ):
        self.store = store
        self.encode = encode
        self.image_source = image_source
        self.load_image = load_image
        self.count_features = count_features
        self.max_length = max_length
        self.skip_unreadable = skip_unreadable
        self.feature_row = feature_row
        self.lengths_path = lengths_path
        self.show_progress = show_progress
        self._lengths: np.ndarray | None = None
        self.report = Report()
        self.numbers = np.arange(len(store))
        self._samples: list[Sample] | None = None
        self.lazy = len(store) > EAGER_LIMIT if lazy is None else lazy
        if not self.lazy:
            self._tokenise_all()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `number` (of its record), `sample`, `pixel_values` [n, 3, H, W] or `feature_rows`; or the number
        and, under `skipped`, why it is left out."""
        return self.items([index])[0]

    def items(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Items of one batch: questions of one image are often in one, which is decoded once."""
        loaded: dict[str, np.ndarray] = {}
        return [self._item(index, loaded) for index in indices]

    def _item(self, index: int, loaded: dict[str, np.ndarray]) -> dict[str, Any]:
        """`loaded` holds images by their keys, and gets those that weren't there."""
        number = int(self.numbers[index])
        item: dict[str, Any] = {"number": number, "skipped": None}
        try:
            item["sample"] = sample = self._sample(index)
            if sample.images and self.feature_row is not None:
                item["feature_rows"] = [self.feature_row(image) for image in sample.images]
            elif sample.images:
                item["pixel_values"] = np.concatenate([self._pixels(image, loaded) for image in sample.images])
        except (FileNotFoundError, LlavaError) as error:
            item["skipped"] = self._left_out(number, error)
        return item

    def _pixels(self, image: Any, loaded: dict[str, np.ndarray]) -> np.ndarray:
        if (key := image_key(image)) not in loaded:
            loaded[key] = self.load_image(self.image_source.read(image))
        return loaded[key]

    def sample(self, index: int) -> Sample:
        """The tokenised sample, without its images (whose sizes may have to be known)."""
        with self.record_errors(int(self.numbers[index])):
            return self._sample(index)

    def sample_if_readable(self, index: int) -> Sample | None:
        """The same; None of one that is left out, and counted, when its turn comes."""
        try:
            return self._sample(index)
        except (FileNotFoundError, LlavaError) as error:
            self._left_out(int(self.numbers[index]), error)
            return None

    def _sample(self, index: int) -> Sample:
        return self._tokenise(int(self.numbers[index])) if self._samples is None else self._samples[index]

    def lengths(self) -> np.ndarray:
        """Length of every sample in positions, int32 [samples]."""
        return np.abs(self._signed_lengths())

    def has_image(self) -> np.ndarray:
        """Whether each sample has an image, bool [samples]."""
        return self._signed_lengths() > 0

    def _signed_lengths(self) -> np.ndarray:
        """Lengths, negative without an image; counted once, kept in `lengths_path` if that takes tokenising."""
        # Which records were left out isn't kept with them.
        kept = self.lengths_path if self.lazy and len(self) == len(self.store) else None
        if self._lengths is None and kept is not None:
            self._lengths = load_lengths(kept, len(self))
        if self._lengths is None:
            signed = (self._signed_length(index) for index in self._progress("counting tokens"))
            self._lengths = np.fromiter(signed, np.int32, len(self))
            if kept is not None:
                save_lengths(kept, self._lengths)
        return self._lengths

    def _signed_length(self, index: int) -> int:
        sample = self.sample_if_readable(index)
        return 1 if sample is None else len(sample.input_ids) * (1 if sample.images else -1)

    def drop_unreadable(self) -> None:
        """Open every image once and leave out the samples whose image can't be read (counted in `report`); one that
        can't is tried again for each of its samples.

        Raises:
            LlavaError: none is left.
        """
        good, opened = [], set[str]()
        for index in self._progress("checking images"):
            number = int(self.numbers[index])
            try:
                for image in self._sample(index).images:
                    if (key := image_key(image)) not in opened:
                        self.load_image(self.image_source.read(image))
                        opened.add(key)
            except (FileNotFoundError, LlavaError) as error:
                self.report.skipped[number] = self._left_out(number, error)
            else:
                good.append(index)
        if not good:
            raise self._nothing_left()
        if self._samples is not None:
            self._samples = [self._samples[index] for index in good]
        self.numbers = self.numbers[good]
        self._lengths = None

    def describe(self, number: int) -> str:
        """Where record `number` is, for messages."""
        return describe(self.store, number, self.store[number])

    def record_error(self, number: int, error: Exception) -> LlavaError:
        """What is wrong with record `number`, with what to do if an image is missing or unreadable."""
        where, skip = self.describe(number), "to drop such records, or add --skip_unreadable_images True"
        if isinstance(error, FileNotFoundError):
            folder = " (no --image_folder was given)" if self.image_source.folder is None else ""
            missing = error.filename or error.args[0]
            note = other_form_note([Path(missing)])
            return LlavaError(
                f'{where}: image "{missing}" not found{folder}{note}; correct --image_folder, run '
                f'"llava-med filter-missing" {skip}'
            )
        if isinstance(error, ImageError):
            return LlavaError(f'{where}: {error}; run "llava-med validate" with --fix {skip}')
        return LlavaError(f"{where}: {error}")

    @contextmanager
    def record_errors(self, number: int) -> Iterator[None]:
        """Within, an error names record `number`, whose it is."""
        try:
            yield
        except (FileNotFoundError, LlavaError) as error:
            raise self.record_error(number, error) from error

    def _left_out(self, number: int, error: Exception) -> str:
        """What is said of a record that is left out for its image; any other error is raised."""
        said = self.record_error(number, error)
        if not (self.skip_unreadable and isinstance(error, FileNotFoundError | ImageError)):
            raise said from error
        return said.args[0]

    def _progress(self, what: str):
        long = self.show_progress and len(self.numbers) > 2000
        return tqdm(range(len(self.numbers)), desc=what, unit="record", disable=not long, leave=False)

    def _tokenise_all(self) -> None:
        """Every sample now; missing images are found before the training starts."""
        samples, numbers = [], []
        for number in self._progress("tokenising"):
            try:
                sample = self._tokenise(number)
                for image in sample.images:
                    self.image_source.find(image)
            except (FileNotFoundError, LlavaError) as error:
                self.report.skipped[number] = self._left_out(number, error)
                continue
            self.report.note(number, sample)
            samples.append(sample)
            numbers.append(number)
        if not samples:
            raise self._nothing_left()
        self._samples, self.numbers = samples, np.array(numbers)

    def _nothing_left(self) -> LlavaError:
        return LlavaError(
            f"{self.store.path}: no record is left; every image is missing or unreadable; correct --image_folder"
        )

    def _tokenise(self, number: int) -> Sample:
        record = self.store[number]
        images = record_images(record)
        features = [self.count_features(image) for image in images]
        encoded = self.encode(record, features)
        input_ids = np.array(encoded.input_ids, np.int32)
        labels = np.array(encoded.labels, np.int32)
        truncated = len(input_ids) > self.max_length
        if truncated:
            length, kept = fitting(input_ids, features, self.max_length)
            input_ids, labels, images = input_ids[:length], labels[:length], images[:kept]
        return Sample(input_ids, labels, images, truncated, encoded.dropped_turns)


class PackedDataset(Dataset):
    """Groups of samples, each one item: batches filled up to a number of tokens."""

    def __init__(self, dataset: LlavaDataset, groups: list[list[int]]):
        self.dataset = dataset
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return self.dataset.items(self.groups[index])


def fitting(input_ids: np.ndarray, features: list[int], max_length: int) -> tuple[int, int]:
    """(length, images) to keep of a sample longer than `max_length`: an image that wouldn't fit whole goes too."""
    places = np.flatnonzero(input_ids == IMAGE_TOKEN_INDEX)
    ends = np.cumsum(features, dtype=np.int64)
    kept = int(np.searchsorted(ends, int((places < max_length).sum()), side="right"))
    started = int(ends[kept - 1]) if kept else 0
    if started < len(places) and places[started] < max_length:
        return int(places[started]), kept
    return max_length, kept


def distinct_images(dataset: LlavaDataset) -> dict[str, tuple[int, Any]]:
    """{key: (record number, image)} of every image in the data, in order of appearance."""
    found: dict[str, tuple[int, Any]] = {}
    for index in range(len(dataset)):
        for image in dataset.sample(index).images:
            found.setdefault(image_key(image), (int(dataset.numbers[index]), image))
    return found
