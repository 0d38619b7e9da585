"""Questions of any record file as one kind of object: LLaVA-Med records and raw VQA-RAD or SLAKE rows.

Evaluation joins answers to them, the audit compares two splits of them.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.conversion import clean_text, yes_no_type
from llava.errors import LlavaError
from llava.records import Record, iter_records

ANSWER_TYPES = ("OPEN", "CLOSED")


@dataclass(frozen=True)
class VqaItem:
    """A question with its reference answer. `fields` holds what else the record says about it.

    `type_inferred`: the record doesn't say OPEN or CLOSED, so an answer of yes or no was taken as CLOSED.
    """

    id: int | str
    image: str | None
    question: str
    answer: str
    answer_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    type_inferred: bool = False


def read_vqa_items(path: str | Path) -> list[VqaItem]:
    """Every question of a file, in order.

    Raises:
        LlavaError: the file can't be read, holds no question, a record is malformed, has an unknown answer
            type, or an id that stands twice; the message names file and record.
    """
    path = Path(path)
    items = [vqa_item(record, f"{path} record {index}") for index, record in enumerate(iter_records(path))]
    if not items:
        raise LlavaError(f"{path}: no questions")
    doubled = [key for key, count in Counter(str(item.id) for item in items).items() if count > 1]
    if doubled:
        raise LlavaError(f"{path}: {len(doubled)} ids stand more than once, first {doubled[0]!r}; make them unique")
    return items


def vqa_item(record: Record, where: str) -> VqaItem:
    """One record as a question; `where` opens the message of an error."""
    item = _from_raw(record, where) if "question" in record and "answer" in record else _from_turns(record, where)
    if "answer_type" not in record:  # PathVQA's rule: an answer of yes or no is closed
        return replace(item, answer_type=yes_no_type(item.answer), type_inferred=True)
    answer_type = str(record["answer_type"]).strip().upper()  # VQA-RAD has some with a blank behind
    if answer_type not in ANSWER_TYPES:
        raise LlavaError(
            f'{where} ("{item.id}"): unknown answer type {record["answer_type"]!r}; '
            f"use one of {', '.join(ANSWER_TYPES)}"
        )
    return replace(item, answer_type=answer_type)


def record_turns(record: Record, where: str) -> list[Record]:
    """The conversation of a record, under its right or its misspelt name."""
    turns = record.get("conversations", record.get("conversatons"))
    well_formed = isinstance(turns, list) and all(isinstance(t, dict) and "value" in t for t in turns)
    if not well_formed:
        raise LlavaError(f'{where} ("{record.get("id")}"): no "conversations" (a list of turns with "value")')
    return turns


def plain_question(text: str) -> str:
    """A question without its image tag."""
    return re.sub(rf"\s*{re.escape(DEFAULT_IMAGE_TOKEN)}\s*", " ", str(text)).strip()


def _from_turns(record: Record, where: str) -> VqaItem:
    turns = record_turns(record, where)
    if len(turns) < 2:
        raise LlavaError(f'{where} ("{record.get("id")}"): expected a question and an answer, got {len(turns)} turn')
    if "id" not in record:
        raise LlavaError(f'{where}: no "id"')
    image = record.get("image")
    if isinstance(image, list):
        image = image[0] if image else None
    known = {"id", "image", "conversations", "conversatons", "answer_type"}
    return VqaItem(
        id=record["id"],
        image=image,
        question=plain_question(turns[0]["value"]),
        answer=clean_text(turns[1]["value"]),
        answer_type="",
        fields={key: value for key, value in record.items() if key not in known},
    )


def _from_raw(record: Record, where: str) -> VqaItem:
    key = next((name for name in ("qid", "question_id", "id") if name in record), None)
    if key is None:
        raise LlavaError(f'{where}: no id ("qid", "question_id" or "id")')
    image = next((record[name] for name in ("image_name", "img_name", "image") if name in record), None)
    known = {"question", "answer", "answer_type", "image_name", "img_name", "image", key}
    return VqaItem(
        id=record[key],
        image=image,
        question=clean_text(record["question"]),
        answer=clean_text(record["answer"]),
        answer_type="",
        fields={name: value for name, value in record.items() if name not in known},
    )
