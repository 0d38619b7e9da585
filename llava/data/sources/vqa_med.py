"""VQA-Med 2019: 4,200 radiology images with questions on modality, plane, organ and abnormality (ImageCLEF 2019).

Reads lines `image|question|answer` of the training and validation sets (by category where the files are there) and
`image|category|question|answer` of the test set. Yes and no are CLOSED, all else is OPEN.

python -m llava.data.convert vqa-med --folder VQA-Med-2019 --output-dir data/vqa_med
"""

import re
from collections.abc import Iterator
from pathlib import Path

from llava.commandline import ArgumentParser, existing_dir
from llava.data.conversion import Conversion, ImageFolder, clean_text, fault_of_texts, vqa_record, yes_no_type
from llava.data.sources.tables import read_lines
from llava.errors import LlavaError
from llava.records import Record

NAME = "vqa-med"

CATEGORIES = ("modality", "plane", "organ", "abnormality")
SPLITS = {"train": "train", "val": "validate", "test": "test"}
_IMAGE_FOLDERS = {"train": "train_images", "val": "val_images", "test": "vqamed2019_test_images"}
_CATEGORY_FILE = re.compile(r"c[1-4]_([a-z]+)_(train|val)\.txt", re.IGNORECASE)
_ALL_FILE = re.compile(r"all_qa_pairs_(train|val)\.txt", re.IGNORECASE)
_TEST_FILE = re.compile(r"vqamed2019_test_questions_w_ref_answers\.txt", re.IGNORECASE)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--folder", required=True, help="the unpacked archives, in this folder or below it")
    parser.add_argument(
        "--category", choices=CATEGORIES, action="append", help="keep these questions alone (default: all categories)"
    )


def default_image_folder(args) -> Path:
    return Path(args.folder)


def convert(args, image_folder: ImageFolder) -> Conversion:
    folder = existing_dir(args.folder, "--folder")
    files = _find_files(folder)
    sources = [path for paths in files.values() for path in paths]
    whole = [path for path in sources if _ALL_FILE.fullmatch(path.name)]
    if args.category and whole:
        raise LlavaError(f"{whole[0]}: says no categories, and C1_Modality_….txt isn't there; drop --category")
    conversion = Conversion(NAME, {}, sources, image_folder=image_folder)
    for split, paths in files.items():
        # With --image-folder the images of all splits lie there; else where the archives have them.
        below = "" if args.image_folder else _images_of(folder, split)
        conversion.splits[SPLITS[split]] = _records(split, paths, below, args.category or CATEGORIES, conversion)
    return conversion


def _find_files(folder: Path) -> dict[str, list[Path]]:
    """The files of questions by split; those by category come before the one that holds all of them."""
    by_category: dict[str, list[Path]] = {}
    whole: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.txt")):
        if match := _CATEGORY_FILE.fullmatch(path.name):
            by_category.setdefault(match[2].lower(), []).append(path)
        elif match := _ALL_FILE.fullmatch(path.name):
            whole.setdefault(match[1].lower(), []).append(path)
        elif _TEST_FILE.fullmatch(path.name):
            whole.setdefault("test", []).append(path)
    found = whole | by_category
    if not found:
        raise LlavaError(
            f"{folder}: holds neither All_QA_Pairs_train.txt, C1_Modality_train.txt (or val) nor "
            f"VQAMed2019_Test_Questions_w_Ref_Answers.txt"
        )
    return {split: found[split] for split in SPLITS if split in found}


def _images_of(folder: Path, split: str) -> str:
    """Where a split's images are below the folder, with a slash at the end."""
    folders = (path for path in sorted(folder.rglob("*")) if path.is_dir())
    place = next((path for path in folders if path.name.lower() == _IMAGE_FOLDERS[split]), None)
    if place is None:
        raise LlavaError(f"{folder}: no folder {_IMAGE_FOLDERS[split]} with the images; give --image-folder")
    return f"{place.relative_to(folder).as_posix()}/"


def _records(split: str, paths: list[Path], below: str, wanted, conversion: Conversion) -> Iterator[Record]:
    number = 0
    for path in paths:
        of_file = match[1].lower() if (match := _CATEGORY_FILE.fullmatch(path.name)) else None
        for where, cells in _lines(path, 4 if split == "test" else 3):
            name, question, answer = cells[0], cells[-2], cells[-1]
            category = cells[1].lower() if split == "test" else of_file
            number += 1
            if category is not None and category not in CATEGORIES:
                raise LlavaError(f"{where}: the category is {category!r}; expected one of {', '.join(CATEGORIES)}")
            if category is not None and category not in wanted:
                conversion.left_out[f"question of another category ({category})"] += 1
                continue
            # Of several right answers ("a#b") the first is the reference; all stay in the record.
            answers = [part for text in answer.split("#") if (part := clean_text(text))]
            if fault := fault_of_texts(question, answers[0] if answers else None):
                conversion.left_out[fault] += 1
                continue
            image = f"{below}{name}.jpg"
            if conversion.accepts(image):
                more = answers if len(answers) > 1 else None
                kind = yes_no_type(answers[0])
                text = " ".join(question.split())  # some questions hold a tab
                yield vqa_record(
                    f"{split}_{number:05d}", image, text, answers[0], kind, question_type=category, answers=more
                )


def _lines(path: Path, cells: int) -> Iterator[tuple[str, list[str]]]:
    """(where it is, cells) of each line that isn't blank."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            found = [cell.strip() for cell in line.split("|")]
            if len(found) != cells or not found[0]:
                form = "image|category|question|answer" if cells == 4 else "image|question|answer"
                raise LlavaError(f"{path} line {number}: expected {form}, got {len(found)} parts")
            yield f"{path} line {number}", found
