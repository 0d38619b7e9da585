"""VQA-RAD: 315 radiology images with questions by clinicians (Lau et al. 2018).

Reads the two files most papers use (3,064 training and 451 test questions) or the one list of the original release,
whose `phrase_type` says what is test.

python -m llava.data.convert vqa-rad --train trainset.json --test testset.json \\
    --image-folder images --output-dir data/vqa_rad
"""

from collections.abc import Iterator
from pathlib import Path

from llava.commandline import ArgumentParser, existing_file
from llava.data.conversion import (
    Conversion,
    ImageFolder,
    clean_text,
    fault_of_texts,
    field_of,
    read_answer_type,
    text_of,
    value_of,
    vqa_record,
)
from llava.data.sources.hub_parquet import parquet_conversion
from llava.errors import LlavaError
from llava.records import Record, read_records

NAME = "vqa-rad"

MISSPELT_TYPES = {"ATRIB": "ATTRIB", "PRSE": "PRES"}
PUBLIC_SPLITS = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--train", help="trainset.json")
    parser.add_argument("--test", help="testset.json")
    parser.add_argument("--public", help='the original release instead: "VQA_RAD Dataset Public.json"')
    parser.add_argument("--parquet", help="the hub's copy instead: a folder of Parquet files; images are taken out")


def convert(args, image_folder: ImageFolder) -> Conversion:
    if sum(map(bool, (args.public, args.parquet, args.train or args.test))) != 1:
        raise LlavaError("vqa-rad: give --train and/or --test, or --public alone, or --parquet alone")
    if args.parquet:
        return parquet_conversion("vqa-rad", args.parquet, args.output_dir)
    given = {"train": args.train, "test": args.test, "public": args.public}
    files = {name: existing_file(path, f"--{name} file") for name, path in given.items() if path}
    conversion = Conversion("vqa-rad", {}, list(files.values()), image_folder=image_folder)
    rows = _read_public(files["public"]) if args.public else {name: _read(path) for name, path in files.items()}
    conversion.splits = {name: _records(split, conversion) for name, split in rows.items()}
    return conversion


def _read(path: Path) -> list[tuple[str, Record]]:
    """(where it is, row) of each row."""
    return [(f"{path} record {index}", row) for index, row in enumerate(read_records(path))]


def _read_public(path: Path) -> dict[str, list[tuple[str, Record]]]:
    splits: dict[str, list[tuple[str, Record]]] = {"train": [], "test": []}
    for where, row in _read(path):
        phrase_type = clean_text(field_of(row, "phrase_type", where))
        if phrase_type not in PUBLIC_SPLITS:
            raise LlavaError(f"{where}: phrase_type is {phrase_type!r}; expected one of {', '.join(PUBLIC_SPLITS)}")
        splits[PUBLIC_SPLITS[phrase_type]].append((where, row))
    return splits


def _records(rows: list[tuple[str, Record]], conversion: Conversion) -> Iterator[Record]:
    for where, row in rows:
        question, answer = value_of(row, "question", where), value_of(row, "answer", where)
        if fault := fault_of_texts(question, answer):
            conversion.left_out[fault] += 1
            continue
        image = text_of(row, "image_name", where)
        if not conversion.accepts(image):
            continue
        answer_type = read_answer_type(field_of(row, "answer_type", where), where)
        question_type = _question_type(row.get("question_type"))
        _count_corrections(row, question_type, answer_type, conversion)
        yield vqa_record(
            text_of(row, "qid", where),
            image,
            question,
            answer,
            answer_type,
            question_type=question_type,
            image_organ=_text_or_none(row.get("image_organ")),
            phrase_type=_text_or_none(row.get("phrase_type")),
        )


def _question_type(value) -> str | None:
    """Upper case, blanks in place, the two misspellings of the release put right; several types stay "A, B"."""
    if value is None:
        return None
    types = [part.strip().upper() for part in str(value).split(",")]
    return ", ".join(MISSPELT_TYPES.get(part, part) for part in types)


def _text_or_none(value) -> str | None:
    return None if value is None else clean_text(value)


def _count_corrections(row: Record, question_type: str | None, answer_type: str, conversion: Conversion) -> None:
    for name in ("answer", "question"):
        if not isinstance(row[name], str):
            conversion.corrected[f"{name} was a number"] += 1
        elif row[name] != row[name].strip():
            conversion.corrected[f"blanks around the {name}"] += 1
    if row["answer_type"] != answer_type:
        conversion.corrected["answer_type"] += 1
    if row.get("question_type") != question_type:
        conversion.corrected["question_type"] += 1
