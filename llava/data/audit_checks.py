"""The audit itself: two lists of questions in, one dictionary of findings out (JSON-ready)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.bars import tqdm
from llava.data.image_likeness import Fingerprint, alike, fingerprint, groups
from llava.data.vqa_items import VqaItem
from llava.errors import LlavaError
from llava.folders import is_file, other_form_note
from llava.image_options import with_options_of
from llava.record_content import image_bytes, image_file, image_key

UNSEEN_IMAGE = "unseen image"
NO_NEAR_DUPLICATE = "no near-duplicate question"


def audit_splits(
    train: Sequence[VqaItem],
    test: Sequence[VqaItem],
    train_images: str | Path | None = None,
    test_images: str | Path | None = None,
    jaccard: float = 0.5,
) -> dict[str, Any]:
    """Compare two splits.

    Args:
        train_images, test_images: folders of the images; None compares images by name alone.
        jaccard: two questions on the same image whose word sets overlap by at least this are near duplicates.

    Returns:
        `images`, `questions`, `answers` (counts), `subsets` (ids of the test questions that are clean in one
        sense or another), `train_on_test_images` (ids of the training questions on an image of the test) and `items`
        (one row per test question).

    Raises:
        LlavaError: an image is missing or can't be read.
    """
    images, same_image = _compare_images(train, test, train_images, test_images)
    by_image: dict[Any, list[VqaItem]] = defaultdict(list)
    for item in train:
        for key in _same_images("train", item, same_image):
            by_image[key].append(item)
    rows = []
    for item in tqdm(test, desc="questions", unit="question", leave=False, disable=None):
        seen = {id(other): other for key in _same_images("test", item, same_image) for other in by_image.get(key, [])}
        rows.append(_question_row(item, list(seen.values()), jaccard))
    tested = {key for item in test for key in _same_images("test", item, same_image)}
    near = [row for row in rows if row["near_duplicate"]]
    questions = {
        "identical": sum(row["identical"] for row in rows),
        "identical_without_punctuation": sum(row["identical_without_punctuation"] for row in rows),
        "near_duplicates": len(near),
        "near_duplicates_with_same_answer": sum(row["same_answer"] for row in near),
        "jaccard": jaccard,
    }
    # Of a record with several questions once.
    on_test_images = dict.fromkeys(
        item.id for item in train if any(key in tested for key in _same_images("train", item, same_image))
    )
    return {
        "train": _count(train),
        "test": _count(test),
        "images": images,
        "questions": questions,
        "answers": _compare_answers(train, test),
        "train_on_test_images": list(on_test_images),
        "subsets": {
            UNSEEN_IMAGE: [row["id"] for row in rows if not row["image_seen"]],
            NO_NEAR_DUPLICATE: [row["id"] for row in rows if not row["near_duplicate"]],
        },
        "items": rows,
    }


def question_words(question: str) -> list[str]:
    """The words of a question: parted by blanks, lower case, letters and digits alone."""
    words = ("".join(filter(str.isalnum, word)) for word in question.lower().split())
    return [word for word in words if word]


def _same_images(split: str, item: VqaItem, same_image: dict[tuple[str, str], Any]) -> list[Any]:
    """The keys of the question's images, each once."""
    return list(dict.fromkeys(same_image[split, key] for key in item.image_keys))


def _question_row(item: VqaItem, seen: Sequence[VqaItem], threshold: float) -> dict[str, Any]:
    """What training asks about the same image; of equally near questions the first counts."""
    text, words = item.question.strip().lower(), question_words(item.question)
    nearest, overlap = None, 0.0
    for other in seen:
        found = _jaccard(set(words), set(question_words(other.question)))
        if found > overlap:
            nearest, overlap = other, found
    return {
        "id": item.id,
        "image_seen": bool(seen),
        "identical": any(other.question.strip().lower() == text for other in seen),
        "identical_without_punctuation": any(question_words(other.question) == words for other in seen),
        "near_duplicate": nearest is not None and overlap >= threshold,
        "jaccard": overlap,
        "nearest": None if nearest is None else nearest.id,
        "nearest_question": None if nearest is None else nearest.question,
        "same_answer": nearest is not None and _answer_key(nearest.answer) == _answer_key(item.answer),
    }


def _jaccard(first: set[str], second: set[str]) -> float:
    either = first | second
    return len(first & second) / len(either) if either else 0.0


def _answer_key(answer: str) -> str:
    return answer.strip().lower()


def _compare_images(train, test, train_images, test_images) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    """Counts, and for each (split, image name) a key that the same image shares in both splits."""
    names = {"train": _images(train), "test": _images(test)}
    # Another slice of a file, or another window, shows the same patient: the file counts.
    files = {split: {name: image_key(image_file(image)) for name, image in names[split].items()} for split in names}
    trained: dict[str, list[str]] = defaultdict(list)
    for name, file in files["train"].items():
        trained[file].append(name)
    by_name = [name for name, file in files["test"].items() if file in trained]
    found: dict[str, Any] = {
        "test_images": len(names["test"]),
        "same_name": len(by_name),
        "compared_by": "name",
    }
    keys: dict[tuple[str, str], Any] = {
        (split, name): file for split, listed in files.items() for name, file in listed.items()
    }
    if train_images is None or test_images is None:
        return found, keys
    folders = {"train": Path(train_images), "test": Path(test_images)}
    prints = {split: _fingerprints(names[split], folders[split], split) for split in names}
    pairs = alike(prints["test"], prints["train"])
    same = [pair for pair in pairs if pair.identical]
    near = [pair for pair in pairs if not pair.identical]
    # One key per group of images that share name or pixels, so that copies under other names count as the same.
    marks = [f"{split}/{name}" for split, name in keys]
    joined = [(f"test/{name}", f"train/{other}") for name in by_name for other in trained[files["test"][name]]]
    joined += [(f"test/{pair.first}", f"train/{pair.second}") for pair in same]
    numbers = groups(joined, marks)
    keys = {(split, name): numbers[f"{split}/{name}"] for split, name in keys}
    renamed = [pair for pair in same if pair.first != pair.second]
    seen = set(by_name) | {pair.first for pair in same}
    found |= {
        "compared_by": "name, pixels and perceptual hash",
        "identical_pixels": len({pair.first for pair in same}),
        "same_name_other_pixels": sorted(
            (names["test"].keys() & names["train"].keys()) - {p.first for p in same if p.first == p.second}
        ),
        "identical_under_another_name": [asdict(pair) for pair in renamed],
        "near_identical": [asdict(pair) for pair in near],
        "seen": len(seen),
        "seen_or_nearly": len(seen | {pair.first for pair in near}),
    }
    return found, keys


def _fingerprints(images: dict[str, Any], folder: Path, split: str) -> dict[str, Fingerprint]:
    prints = {}
    for name, image in tqdm(images.items(), desc=f"{split} images", unit="image", leave=False, disable=None):
        file, source = image_file(image), image_file(image)
        if not isinstance(file, str):
            source = image_bytes(file)
        elif not file.startswith("data:"):
            source = path = folder / file
            if not is_file(path):
                raise LlavaError(f"{split} image not found: {path}{other_form_note([path])}; check --image-folder")
        prints[name] = fingerprint(with_options_of(image, source))
    return prints


def _images(items: Iterable[VqaItem]) -> dict[str, Any]:
    """Every distinct image by its name, in order of appearance."""
    found: dict[str, Any] = {}
    for item in items:
        for name, image in zip(item.image_keys, item.images):
            found.setdefault(name, image)
    return found


def _count(items: Sequence[VqaItem]) -> dict[str, int]:
    kinds = Counter(item.answer_type for item in items)
    return {"questions": len(items), "open": kinds["OPEN"], "closed": kinds["CLOSED"], "images": len(_images(items))}


def _compare_answers(train: Sequence[VqaItem], test: Sequence[VqaItem]) -> dict[str, Any]:
    """What training's answers give away without a look at the image, by answer type (counts of test questions).

    `in_training`: the answer is one of training's. `majority`: it is training's commonest. `same_question`: it is
    the commonest answer that training gives to the same question on whatever image (`same_question_known` of
    the test questions stand in training).
    """
    found = {}
    for kind in ("OPEN", "CLOSED"):
        known = Counter(_answer_key(item.answer) for item in train if item.answer_type == kind)
        by_question: dict[tuple, Counter] = defaultdict(Counter)
        for item in train:
            if item.answer_type == kind:
                by_question[tuple(question_words(item.question))][_answer_key(item.answer)] += 1
        tested = [item for item in test if item.answer_type == kind]
        majority = known.most_common(1)[0][0] if known else None
        asked = [(item, by_question.get(tuple(question_words(item.question)))) for item in tested]
        found[kind] = {
            "questions": len(tested),
            "in_training": sum(_answer_key(item.answer) in known for item in tested),
            "majority_answer": majority,
            "majority": sum(_answer_key(item.answer) == majority for item in tested),
            "same_question_known": sum(bool(answers) for _, answers in asked),
            "same_question": sum(
                answers.most_common(1)[0][0] == _answer_key(item.answer) for item, answers in asked if answers
            ),
            "train_priors": known.most_common(10),
            "test_priors": Counter(_answer_key(item.answer) for item in tested).most_common(10),
        }
    return found
