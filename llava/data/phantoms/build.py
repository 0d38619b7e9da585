"""The files of the built-in set: facts drawn by seed and split, images drawn by several processes, records."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.bars import tqdm
from llava.data.phantoms.conversations import (
    caption_record,
    comparison_record,
    conversation_record,
    retelling_record,
    test_records,
    text_record,
)
from llava.data.phantoms.drawing import draw
from llava.data.phantoms.findings import Phantom, draw_facts
from llava.data.phantoms.questions import TEMPLATES, Dealer
from llava.errors import LlavaError
from llava.processes import process_pool
from llava.records import read_json, write_json, write_records

ABOUT = "phantoms.json"
CHUNK = 256
NORMAL_SHARE = 0.1
TEST_NORMALS = 48
TRAIN, TEST, TEXT = 0, 1, 2
"""Streams of random numbers: splits share none."""


@dataclass(frozen=True)
class Counts:
    """How many images and records to make.

    `train` images have a caption each; the first `conversations` and `vqa` of them conversations (stage 2) and
    VQA records of several turns, both in as many different versions as `rounds` says. `test` images have one
    record per question. `text` records have no image; they get harder from first to last.
    """

    train: int = 16_000
    test: int = 208
    conversations: int = 3_000
    vqa: int = 6_000
    text: int = 16_000
    rounds: int = 1


def write_phantoms(
    folder: str | Path,
    seed: int = 0,
    counts: Counts | None = None,
    *,
    size: int = 96,
    processes: int = 2,
    overwrite: bool = True,
) -> dict[str, int]:
    """Write the set into `folder`: `images/*.png`, `captions.json`, `conversations.json`, `vqa_train.json`,
    `vqa_test.json`, `text.json` and, last, `phantoms.json` with seed and counts. Returns records per file.

    Args:
        size: pixels per side of an image.
        processes: how many draw.
        overwrite: replace another set that is there.

    Raises:
        LlavaError: such sets can't be drawn, or another one is there that may not be replaced.
    """
    counts = counts or Counts()
    _check(counts, size, processes)
    if seed < 0:
        raise LlavaError(f"--seed {seed}: give 0 or more")
    folder = Path(folder)
    about = {"seed": seed, "size": size, **asdict(counts), "templates": len(TEMPLATES)}
    if not overwrite:
        _refuse_another(folder, about)
    train = draw_facts(counts.train, seed, held_out=False, normal_share=NORMAL_SHARE, stream=TRAIN)
    normal_share = min(TEST_NORMALS / max(counts.test, 1), 0.3)
    test = draw_facts(counts.test, seed, held_out=True, normal_share=normal_share, stream=TEST)
    train_names = [f"train_{index:05d}" for index in range(len(train))]
    test_names = [f"test_{index:05d}" for index in range(len(test))]
    _draw_all(folder / "images", [*train_names, *test_names], [*train, *test], size, seed, processes)
    text = draw_facts(counts.text, seed, held_out=False, normal_share=NORMAL_SHARE, stream=TEXT)
    files = {
        "captions.json": [caption_record(name, phantom) for name, phantom in zip(train_names, train)],
        "conversations.json": _conversations(train_names, train, counts.conversations, counts, seed, 2),
        "vqa_train.json": _conversations(train_names, train, counts.vqa, counts, seed, 3),
        "vqa_test.json": test_records(test_names, test),
        "text.json": _texts(text, seed),
    }
    written = {name: write_records(folder / name, records) for name, records in files.items()}
    write_json(folder / ABOUT, {**about, "records": written})
    return written


def _refuse_another(folder: Path, about: dict[str, Any]) -> None:
    kept = read_json(folder / ABOUT) if (folder / ABOUT).is_file() else None
    if kept is None and (folder / "captions.json").exists():
        kept = {}
    if kept is not None and (other := [name for name, value in about.items() if kept.get(name) != value]):
        raise LlavaError(
            f"{folder} holds another set (different: {', '.join(other)}); "
            "give another folder, or --overwrite to replace it"
        )


def _check(counts: Counts, size: int, processes: int) -> None:
    if size < 32:
        raise LlavaError(f"phantoms of {size} pixels show nothing; give at least 32")
    if min(counts.train, counts.test) < 1 or max(counts.conversations, counts.vqa) > counts.train:
        raise LlavaError("phantoms: train and test are at least 1, conversations and vqa at most as many as train")
    for name, least in (("conversations", 0), ("vqa", 0), ("text", 0), ("rounds", 1)):
        if (given := getattr(counts, name)) < least:
            raise LlavaError(f"--{name} {given}: give {least} or more")
    if processes < 1:
        raise LlavaError(f"--processes {processes}: give 1 or more")


def _conversations(names, phantoms, images: int, counts: Counts, seed: int, stream: int):
    random = np.random.default_rng([seed, TRAIN, stream])
    dealer = Dealer()
    return [
        conversation_record(f"{name}_{version}", name, phantom, dealer, random)
        for version in range(counts.rounds)
        for name, phantom in zip(names[:images], phantoms[:images])
    ]


LESSONS = ((0.36, "c"), (0.28, "rrc"), (0.36, "rtttcc"))
"""What the language model reads, from easy to hard: shares of the records, and which kinds go round in each.

c compares, r retells notes as a caption, t talks about notes.
"""


def _texts(phantoms: Sequence[Phantom], seed: int):
    random = np.random.default_rng([seed, TEXT, 2])
    dealer = Dealer()
    kinds = "".join((kinds * len(phantoms))[: round(share * len(phantoms))] for share, kinds in LESSONS)
    makers = {
        "c": lambda name, phantom: comparison_record(name, phantom, dealer, random),
        "r": lambda name, phantom: retelling_record(name, phantom, random),
        "t": lambda name, phantom: text_record(name, phantom, dealer, random),
    }
    # Rounding may leave one or two over, which are of the last kind.
    kinds = kinds[: len(phantoms)].ljust(len(phantoms), LESSONS[-1][1][-1])
    return [makers[kind](f"text_{index:05d}", phantom) for index, (kind, phantom) in enumerate(zip(kinds, phantoms))]


def _draw_all(folder: Path, names: list[str], phantoms: list[Phantom], size: int, seed: int, processes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(names), CHUNK)
    jobs = [
        (folder, names[start : start + CHUNK], phantoms[start : start + CHUNK], size, [seed, start]) for start in starts
    ]
    with tqdm(total=len(names), desc="drawing", unit="image") as bar:
        if processes == 1:
            for job in jobs:
                bar.update(_draw_chunk(job))
            return
        with process_pool(processes, start="spawn") as pool:
            for done in pool.map(_draw_chunk, jobs):
                bar.update(done)


def _draw_chunk(job: tuple) -> int:
    """Draw a chunk and write it; its random numbers depend on the seed and its place alone."""
    folder, names, phantoms, size, stream = job
    images = draw(phantoms, size, np.random.default_rng([*stream, 1]))
    for name, image in zip(names, images):
        Image.fromarray(image).save(folder / f"{name}.png", compress_level=1)
    return len(names)
