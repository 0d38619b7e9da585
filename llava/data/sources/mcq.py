"""Multiple choice: PMC-VQA's CSV tables and OmniMedVQA's JSON files, with the options in the question.

The answer is the right option's letter (or its text, --answer text). With --orders N each question is asked N times
with its options in another order, for the metric of consistency; the right letter then moves with its option.

python -m llava.data.convert mcq --input PMC-VQA/test_2.csv --image-folder PMC-VQA/images --output-dir data/pmc_vqa
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.commandline import ArgumentParser
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.conversion import Conversion, ImageFolder, clean_text, fault_of_texts, text_of, value_of, vqa_record
from llava.data.sources.tables import read_table
from llava.errors import LlavaError
from llava.record_content import OPTION_LETTERS, first_given
from llava.records import Record, iter_records

NAME = "mcq"

PROMPTS = {
    "letter": "Answer with the letter of the right option.",
    "text": "Answer with the right option.",
}


class Choice(NamedTuple):
    """A row of either set. `right` is the place of the right option."""

    key: str
    image: str
    question: str
    options: list[str]
    right: int
    fields: dict[str, Any]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, help="PMC-VQA's .csv, OmniMedVQA's .json, folders of them")
    parser.add_argument("--split", default="test", help="name of the output file")
    parser.add_argument("--answer", choices=tuple(PROMPTS), default="letter", help="what answers say")
    parser.add_argument("--orders", type=int, default=1, help="how often to ask each question, with its options moved")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")


def convert(args, image_folder: ImageFolder) -> Conversion:
    if args.orders < 1:
        raise LlavaError(f"--orders {args.orders}: give 1 or more")
    files = _find_files(args.input)
    conversion = Conversion(NAME, {}, files, image_folder=image_folder, candidates=False)
    conversion.splits = {args.split: _records(files, args, conversion)}
    return conversion


def _find_files(given: Sequence[str]) -> list[Path]:
    files = []
    for path in map(Path, given):
        found = sorted(path.rglob("*.json")) + sorted(path.rglob("*.csv")) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            raise LlavaError(f"--input {path}: neither a file nor a folder with .json or .csv files")
        files += found
    return files


def _records(files: Sequence[Path], args, conversion: Conversion) -> Iterator[Record]:
    for path in files:
        rows = _read_pmc_vqa(path, conversion) if path.suffix.lower() == ".csv" else _read_omni(path, conversion)
        for choice in rows:
            if args.answer == "text" and any(text.upper() in OPTION_LETTERS for text in choice.options):
                conversion.left_out["an option is a letter alone, which names another one where they move"] += 1
            elif conversion.accepts(choice.image):
                orders = option_orders(len(choice.options), args.orders, f"{args.seed} {choice.key}")
                if len(orders) < args.orders:
                    conversion.corrected["questions with fewer orders of their options than asked for"] += 1
                for number, places in enumerate(orders):
                    yield _record(choice, number, places, args)


def option_orders(options: int, wanted: int, seed: str) -> list[tuple[int, ...]]:
    """Different orders of `options` options, as places: as given, then rotated so that each takes every letter, then
    random ones."""
    orders = dict.fromkeys(tuple((place + turn) % options for place in range(options)) for turn in range(options))
    generator = random.Random(seed)
    while len(orders) < min(wanted, math.factorial(options)):
        orders[tuple(generator.sample(range(options), options))] = None
    return list(orders)[:wanted]


def _record(choice: Choice, order: int, places: Sequence[int], args) -> Record:
    options = [choice.options[place] for place in places]
    letter = OPTION_LETTERS[places.index(choice.right)]
    listed = "\n".join(f"{name}. {option}" for name, option in zip(OPTION_LETTERS, options))
    key = choice.key if args.orders == 1 else f"{choice.key}#{order}"
    return vqa_record(
        key,
        choice.image,
        f"{clean_text(choice.question)}\n{listed}\n{PROMPTS[args.answer]}",
        letter if args.answer == "letter" else choice.options[choice.right],
        "CHOICE",
        options=options,
        source_id=choice.key if args.orders > 1 else None,
        **choice.fields,
    )


def _read_pmc_vqa(path: Path, conversion: Conversion) -> Iterator[Choice]:
    """Rows of PMC-VQA: options as " A:text", the right one as a letter (`Answer_label`, in test_2.csv `Answer`)."""
    letters = OPTION_LETTERS[:4]
    choices = [f"Choice {letter}" for letter in letters]
    for line, row in read_table(path, ["Figure_path", "Question", *choices, "Answer"]):
        where = f"{path} line {line}"
        given = {letter: _without_letter(row[f"Choice {letter}"], letter) for letter in letters}
        name = clean_text(row.get("Answer_label") or row["Answer"]).upper()
        if name not in given:
            raise LlavaError(f"{where}: the answer is {name!r}; expected one of {', '.join(letters)}")
        key = f"{path.stem}_{line:06d}"
        yield from _choice(key, row["Figure_path"], row["Question"], given, given[name], {}, conversion)


def _read_omni(path: Path, conversion: Conversion) -> Iterator[Choice]:
    """Rows of OmniMedVQA: `option_A` to `option_D` (some are missing), the right one as its text (`gt_answer`)."""
    for index, row in enumerate(iter_records(path)):
        where = f"{path} record {index}"
        given = {letter: text_of(row, f"option_{letter}", where, optional=True) for letter in OPTION_LETTERS}
        right = text_of(row, "gt_answer", where)
        if right.lower() not in {text.lower() for text in given.values() if text}:
            raise LlavaError(f"{where}: gt_answer {right!r} is none of its options")
        fields = {
            "question_type": row.get("question_type"),
            "modality": first_given(row, "modality_type", "modality"),
            "dataset": row.get("dataset"),
        }
        image, question = text_of(row, "image_path", where), value_of(row, "question", where)
        yield from _choice(text_of(row, "question_id", where), image, question, given, right, fields, conversion)


def _choice(
    key: str,
    image: str,
    question: Any,
    given: dict[str, str],
    right: str,
    fields: dict[str, Any],
    conversion: Conversion,
) -> Iterator[Choice]:
    """The row, unless something is wrong with it that is counted."""
    options = [text for text in given.values() if text]
    lowered = [text.lower() for text in options]
    if fault := fault_of_texts(question, right):
        conversion.left_out[fault] += 1
    elif any(DEFAULT_IMAGE_TOKEN in text for text in options):
        conversion.left_out[f"an option holds {DEFAULT_IMAGE_TOKEN}"] += 1
    elif len(options) < 2:
        conversion.left_out["fewer than two options"] += 1
    elif len(set(lowered)) < len(lowered):
        conversion.left_out["two options are the same"] += 1
    else:
        place = lowered.index(right.lower())
        yield Choice(key, image.strip(), question, options, place, fields)


def _without_letter(text: str, letter: str) -> str:
    """ " A: left lung" without its letter."""
    return re.sub(rf"^\s*{letter}\s*[:.)]\s*", "", text).strip()
