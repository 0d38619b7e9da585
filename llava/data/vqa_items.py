"""Questions of any record file as one kind of object: LLaVA-Med records and raw VQA-RAD or SLAKE rows.

Evaluation joins answers to them, the audit compares two splits of them.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.conversion import clean_text, yes_no_type
from llava.errors import LlavaError, amount
from llava.record_content import (
    TURN_KEYS,
    first_given,
    image_key,
    images_of,
    question_answer_pairs,
    read_named,
    read_turns,
)
from llava.records import Record, iter_records

ANSWER_TYPES = ("OPEN", "CLOSED", "CHOICE")
"""CHOICE: one of the options that the record lists (`options`)."""


@dataclass(frozen=True)
class VqaItem:
    """A question with its reference answer. `fields` holds what else the record says about it.

    `images`: as the record has them (`llava.record_content.record_images`). `type_inferred`: the record doesn't say
    OPEN or CLOSED, so an answer of yes or no was taken as CLOSED.
    """

    id: int | str
    images: tuple[Any, ...]
    question: str
    answer: str
    answer_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    type_inferred: bool = False

    @property
    def image_keys(self) -> tuple[str, ...]:
        """A name of each image: its path, or a digest of an embedded one."""
        return tuple(image_key(image) for image in self.images)

    @property
    def image(self) -> str | None:
        """The first image's name; None without images."""
        return image_key(self.images[0]) if self.images else None


def read_vqa_items(path: str | Path, *, later_turns: bool = False) -> list[VqaItem]:
    """The first question of each record of a file, in order; with `later_turns` the others too, under the record's id.

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
        stand = amount(len(doubled), "id stands", "ids stand")
        raise LlavaError(f"{path}: {stand} more than once, first {doubled[0]!r}; make them unique")
    if later_turns:
        return [item for first, record in zip(items, iter_records(path)) for item in (first, *_later(first, record))]
    return items


def _later(first: VqaItem, record: Record) -> list[VqaItem]:
    if "question" in record and "answer" in record:
        return []
    pairs = question_answer_pairs(read_turns(record))[1:]
    return [
        replace(
            first,
            question=plain_question(question),
            answer=clean_text(answer),
            answer_type=yes_no_type(answer),
            type_inferred=True,
        )
        for question, answer in pairs
    ]


def vqa_item(record: Record, where: str) -> VqaItem:
    """One record as a question; `where` opens the message of an error."""
    item = _from_raw(record, where) if "question" in record and "answer" in record else _from_turns(record, where)
    if record.get("answer_type") is None:  # PathVQA's rule: an answer of yes or no is closed
        return replace(item, answer_type=yes_no_type(item.answer), type_inferred=True)
    answer_type = str(record["answer_type"]).strip().upper()  # VQA-RAD has some with a trailing space
    if answer_type not in ANSWER_TYPES:
        raise LlavaError(
            f'{where} ("{item.id}"): unknown answer type {record["answer_type"]!r}; '
            f"use one of {', '.join(ANSWER_TYPES)}"
        )
    return replace(item, answer_type=answer_type)


def plain_question(text: str) -> str:
    """A question without its image tag."""
    return " ".join(part.strip() for part in str(text).split(DEFAULT_IMAGE_TOKEN)).strip()


def _from_turns(record: Record, where: str) -> VqaItem:
    key, dialogue = read_named(record, where)
    pairs = question_answer_pairs(dialogue.turns)
    if not pairs:
        raise LlavaError(f'{where} ("{key}"): expected a question and an answer, got {len(dialogue.turns)} turn')
    question, answer = pairs[0]
    known = {"id", "image", "images", "answer_type", *TURN_KEYS}
    return VqaItem(
        id=key,
        images=tuple(images_of(record, f'{where} ("{key}")')),
        question=plain_question(question),
        answer=clean_text(answer),
        answer_type="",
        fields={name: value for name, value in record.items() if name not in known},
    )


def _from_raw(record: Record, where: str) -> VqaItem:
    ids, names = ("qid", "question_id", "id"), ("image_name", "img_name")
    key = first_given(record, *ids)
    if key is None:
        raise LlavaError(f'{where}: no id ("qid", "question_id" or "id")')
    absent = [name for name in ("question", "answer") if record[name] is None]
    if absent:
        raise LlavaError(f'{where} ("{key}"): the {absent[0]} is null')
    image = first_given(record, *names)
    known = {"question", "answer", "answer_type", "image", "images", *names}
    known.add(next(name for name in ids if record.get(name) is not None))
    return VqaItem(
        id=key,
        images=tuple(images_of(record, f'{where} ("{key}")') if image is None else [image]),
        question=clean_text(record["question"]),
        answer=clean_text(record["answer"]),
        answer_type="",
        fields={name: value for name, value in record.items() if name not in known},
    )
