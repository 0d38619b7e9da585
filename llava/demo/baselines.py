"""The baseline of nearest images: a test question gets the answer of the most similar training image."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from llava.bars import tqdm
from llava.data.vqa_items import VqaItem
from llava.eval.answers.memory import Known, write_memory_answers
from llava.images import open_image


def answer_by_nearest(train: Path, test: Path, image_folder: Path, answers: Path) -> int:
    """Answer each test question from the training image that is nearest by pixels (least mean square) among
    those that the same question was asked about; empty where it was asked about none. Returns how many are empty.
    """
    return write_memory_answers(train, test, answers, partial(_likeness, image_folder), 1, "memory: nearest pixels")


def _likeness(folder: Path, known: Sequence[Known], asked: Sequence[VqaItem]) -> Iterator[np.ndarray]:
    train_names = sorted({str(one.image) for one in known})
    test_names = sorted({str(item.image) for item in asked})
    distances = _distances(_pixels(folder, test_names, "test images"), _pixels(folder, train_names, "training images"))
    columns = {name: index for index, name in enumerate(train_names)}
    rows = {name: index for index, name in enumerate(test_names)}
    places = np.array([columns[str(one.image)] for one in known])
    questions = np.array([one.question for one in known])
    for item in asked:
        yield np.where(questions == item.question, -distances[rows[str(item.image)], places], -np.inf)


def _pixels(folder: Path, names: list[str], what: str) -> np.ndarray:
    """float32 [images, values], 0 to 1."""
    bar = tqdm(names, desc=what, unit="image", leave=False, disable=None)
    return np.stack([np.asarray(open_image(folder / name), np.uint8).reshape(-1) for name in bar])


def _distances(test: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Squared distances [test, train], in parts: images are kept as bytes."""
    test = test.astype(np.float32) / 255
    parts = []
    for start in range(0, len(train), 1000):
        part = train[start : start + 1000].astype(np.float32) / 255
        parts.append((test**2).sum(1)[:, None] - 2 * test @ part.T + (part**2).sum(1)[None])
    return np.concatenate(parts, axis=1)
