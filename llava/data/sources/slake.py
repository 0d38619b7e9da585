"""SLAKE: 642 radiology images with questions in English and Chinese (Liu et al. 2021).

Papers report the English questions. CLOSED is not only yes and no there: the file's own answer_type is kept.

python -m llava.data.convert slake --folder Slake1.0 --output-dir data/slake
"""

from collections.abc import Iterator
from pathlib import Path

from llava.commandline import ArgumentParser, existing_dir, existing_file
from llava.data.conversion import (
    Conversion,
    ImageFolder,
    fault_of_texts,
    field_of,
    read_answer_type,
    text_of,
    value_of,
    vqa_record,
)
from llava.errors import LlavaError
from llava.records import Record, iter_records

NAME = "slake"

FILES = {"train": ("train.json",), "validate": ("validate.json", "validation.json"), "test": ("test.json",)}
LANGUAGES = ("en", "zh", "all")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--folder", help="the unpacked Slake1.0: train.json, validate.json, test.json, imgs/")
    parser.add_argument("--train", help="train.json, instead of --folder")
    parser.add_argument("--validate", help="validate.json, instead of --folder")
    parser.add_argument("--test", help="test.json, instead of --folder")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of the questions to keep")


def default_image_folder(args) -> Path | None:
    return Path(args.folder) / "imgs" if args.folder else None


def convert(args, image_folder: ImageFolder) -> Conversion:
    files = _files(args)
    conversion = Conversion("slake", {}, list(files.values()), image_folder=image_folder)
    conversion.splits = {split: _records(path, args.language, conversion) for split, path in files.items()}
    return conversion


def _files(args) -> dict[str, Path]:
    given = {split: getattr(args, split) for split in FILES if getattr(args, split)}
    if bool(args.folder) == bool(given):
        raise LlavaError("slake: give --folder, or some of --train, --validate and --test")
    if given:
        return {split: existing_file(path, f"--{split} file") for split, path in given.items()}
    folder = existing_dir(args.folder, "--folder")
    found = {split: path for split, names in FILES.items() for name in names if (path := folder / name).is_file()}
    if not found:
        raise LlavaError(f"{folder}: holds none of {', '.join(name for names in FILES.values() for name in names)}")
    return found


def _records(path: Path, language: str, conversion: Conversion) -> Iterator[Record]:
    for index, row in enumerate(iter_records(path)):
        where = f"{path} record {index}"
        spoken = field_of(row, "q_lang", where)
        if language not in ("all", spoken):
            conversion.left_out[f"question in another language ({spoken})"] += 1
            continue
        question, answer = value_of(row, "question", where), value_of(row, "answer", where)
        if fault := fault_of_texts(question, answer):
            conversion.left_out[fault] += 1
            continue
        image = text_of(row, "img_name", where)
        if not conversion.accepts(image):
            continue
        answer_type = read_answer_type(field_of(row, "answer_type", where), where)
        yield vqa_record(
            text_of(row, "qid", where),
            image,
            question,
            answer,
            answer_type,
            question_type=row.get("content_type"),
            image_organ=row.get("location"),
            modality=row.get("modality"),
            base_type=row.get("base_type"),
            language=spoken,
        )
