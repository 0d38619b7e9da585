"""Your own data: a CSV (or TSV) table with a column each for image, question and answer.

With --test-fraction a part of the images, and all their questions, is kept apart for testing.

python -m llava.data.convert csv --input table.csv --image-folder images --output-dir data/own
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from llava.commandline import ArgumentParser, existing_file
from llava.data.conversion import (
    Conversion,
    ImageFolder,
    fault_of_texts,
    read_answer_type,
    text_of,
    vqa_record,
    yes_no_type,
)
from llava.data.sources.tables import read_table
from llava.errors import LlavaError
from llava.record_content import image_key
from llava.records import Record

logger = logging.getLogger(__name__)

NAME = "csv"

_TAKEN = ("id", "image", "conversations", "answer_type", "question", "answer")
"""What columns that are kept can't be called: records have these already, or would be read by them as other records."""
COLUMN_FLAGS = "--image-column, --question-column, --answer-column and --delimiter say what is what"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--input", required=True, help="the table, UTF-8, with a line of column names")
    parser.add_argument("--image-column", default="image", help="file name in the image folder; may be empty")
    parser.add_argument("--question-column", default="question", help="column of the question")
    parser.add_argument("--answer-column", default="answer", help="column of the answer")
    parser.add_argument("--id-column", help="unique name of each row; without it the line number serves")
    parser.add_argument("--answer-type-column", help="OPEN or CLOSED; without it yes and no are CLOSED, all else OPEN")
    parser.add_argument("--keep-columns", help="further columns to keep in the records, by comma")
    parser.add_argument("--delimiter", help="between cells; default: a tab for .tsv, else a comma")
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=0.0,
        help="share of the images that become test.json; each is drawn by itself, so few images can be far off",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of test images")


def convert(args, image_folder: ImageFolder) -> Conversion:
    path = existing_file(args.input, "--input table")
    if not 0 <= args.test_fraction < 1:
        raise LlavaError(f"--test-fraction {args.test_fraction}: give a number from 0 up to, but not including, 1")
    taken = [name for name in _kept_columns(args) if name in _TAKEN]
    if taken:
        raise LlavaError(f"--keep-columns {taken[0]}: records have a field of that name; rename the column")
    conversion = Conversion("csv", {}, [path], image_folder=image_folder)
    names = ["train", "test"] if args.test_fraction else ["train"]
    # Counts are made in one pass only, or every row left out would be counted once per split.
    records = list(_records(path, args, conversion))
    tested = _choose({_split_key(record) for record in records}, args) if args.test_fraction else set()
    if tested:
        images = len({_split_key(record) for record in records})
        logger.info("%d of %d images are for testing (another --seed draws others)", len(tested), images)
    conversion.splits = {
        name: [record for record in records if (_split_key(record) in tested) == (name == "test")] for name in names
    }
    return conversion


def _records(path: Path, args, conversion: Conversion) -> Iterator[Record]:
    kept = _kept_columns(args)
    named = [
        args.image_column,
        args.question_column,
        args.answer_column,
        args.id_column,
        args.answer_type_column,
        *kept,
    ]
    for line, row in read_table(path, [name for name in named if name], args.delimiter, COLUMN_FLAGS):
        where = f"{path} line {line}"
        question, answer = row[args.question_column], row[args.answer_column]
        if fault := fault_of_texts(question, answer):
            conversion.left_out[fault] += 1
            continue
        image = row[args.image_column].strip() or None
        if image is not None and not conversion.accepts(image):
            continue
        kind = row[args.answer_type_column] if args.answer_type_column else yes_no_type(answer)
        name = text_of(row, args.id_column, where) if args.id_column else f"{line:06d}"
        further = {column: row[column].strip() for column in kept}
        yield vqa_record(name, image, question, answer, read_answer_type(kind, where), **further)


def _kept_columns(args) -> list[str]:
    return [name for part in (args.keep_columns or "").split(",") if (name := part.strip())]


def _split_key(record: Record) -> str:
    """What the split goes by, so that no test image is ever seen in training."""
    return image_key(record.get("image", record["id"]))


def _choose(images: set[str], args) -> set[str]:
    """The images for testing, by their names, so that each stays where it is when others come. At least one is
    chosen, and one isn't."""
    if len(images) == 1:
        raise LlavaError(f"{args.input}: one image can't be split; bring more, or leave --test-fraction out")

    def share(image: str) -> float:
        digest = hashlib.sha256(f"{args.seed} {image}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    ordered = sorted(images, key=share)
    count = sum(share(image) < args.test_fraction for image in ordered)
    return set(ordered[: max(1, min(count, len(ordered) - 1))])
