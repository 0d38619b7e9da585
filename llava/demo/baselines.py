"""The baseline of nearest images: a test question gets the answer of the most similar training image."""

from pathlib import Path

import numpy as np

from llava.bars import tqdm
from llava.data.vqa_items import plain_question
from llava.images import open_image
from llava.records import Record, read_records, write_records


def answer_by_nearest(train: Path, test: Path, image_folder: Path, answers: Path) -> int:
    """Answer each test question from the training image that is nearest by pixels (least mean square) among
    those that the same question was asked about; empty where it was asked about none. Returns how many are empty.
    """
    train_records, test_records = read_records(train), read_records(test)
    train_names = sorted({record["image"] for record in train_records})
    test_names = sorted({record["image"] for record in test_records})
    distances = _distances(
        _pixels(image_folder, test_names, "test images"), _pixels(image_folder, train_names, "training images")
    )
    row = {name: index for index, name in enumerate(test_names)}
    column = {name: index for index, name in enumerate(train_names)}
    asked: dict[str, list[tuple[int, str]]] = {}
    for record in train_records:
        turns = record["conversations"]
        for question, answer in zip(turns[::2], turns[1::2]):
            asked.setdefault(plain_question(question["value"]), []).append((column[record["image"]], answer["value"]))
    texts = [_nearest(record, asked, distances[row[record["image"]]]) for record in test_records]
    write_records(answers, ({"question_id": r["id"], "text": text} for r, text in zip(test_records, texts)))
    return texts.count("")


def _nearest(record: Record, asked: dict[str, list[tuple[int, str]]], distances: np.ndarray) -> str:
    known = asked.get(plain_question(record["conversations"][0]["value"]))
    return min(known, key=lambda pair: distances[pair[0]])[1] if known else ""


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
