"""PathVQA: about 5,000 pathology images with 32,000 questions (He et al. 2020).

Reads the original folder (pickled questions, read without running anything in them) or the hub's Parquet copy. The set
has no answer types: yes and no are CLOSED, all else is OPEN.

python -m llava.data.convert pathvqa --folder PathVQA --output-dir data/path_vqa
"""

from collections.abc import Iterator
from pathlib import Path

from llava.commandline import ArgumentParser, existing_dir
from llava.data.conversion import (
    Conversion,
    ImageFolder,
    fault_of_texts,
    text_of,
    value_of,
    vqa_record,
    yes_no_type,
)
from llava.data.sources.hub_parquet import parquet_conversion
from llava.data.sources.plain_pickle import read_plain_pickle
from llava.errors import LlavaError
from llava.records import Record

NAME = "pathvqa"

SPLITS = {"train": "train", "val": "validate", "test": "test"}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--folder", help="the original: qas/{train,val,test}_qa.pkl and images/{train,val,test}/")
    parser.add_argument("--parquet", help="the hub's copy instead: a folder of Parquet files; images are taken out")


def default_image_folder(args) -> Path | None:
    return Path(args.folder) / "images" if args.folder else None


def convert(args, image_folder: ImageFolder) -> Conversion:
    if bool(args.folder) == bool(args.parquet):
        raise LlavaError("pathvqa: give --folder or --parquet")
    if args.parquet:
        return parquet_conversion("pathvqa", args.parquet, args.output_dir)
    folder = existing_dir(args.folder, "--folder")
    found = {split: path for split in SPLITS if (path := _questions_file(folder, split))}
    if not found:
        raise LlavaError(f"{folder}: no qas/train_qa.pkl, qas/val_qa.pkl or qas/test_qa.pkl")
    conversion = Conversion("pathvqa", {}, list(found.values()), image_folder=image_folder)
    conversion.splits = {SPLITS[split]: _records(path, split, conversion) for split, path in found.items()}
    return conversion


def _questions_file(folder: Path, split: str) -> Path | None:
    places = (folder / "qas" / f"{split}_qa.pkl", folder / "qas" / split / f"{split}_qa.pkl")
    return next((path for path in places if path.is_file()), None)


def _records(path: Path, split: str, conversion: Conversion) -> Iterator[Record]:
    rows = read_plain_pickle(path)
    if not isinstance(rows, list):
        raise LlavaError(f"{path}: expected a list of questions, got {type(rows).__name__}")
    for index, row in enumerate(rows):
        where = f"{path} record {index}"
        question, answer = value_of(row, "question", where), value_of(row, "answer", where)
        if fault := fault_of_texts(question, answer):
            conversion.left_out[fault] += 1
            continue
        image = f"{split}/{text_of(row, 'image', where)}.jpg"
        if conversion.accepts(image):
            yield vqa_record(f"{split}_{index:05d}", image, question, answer, yes_no_type(answer))
