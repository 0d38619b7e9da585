"""Questions to answer, from LLaVA-Med records or from JSONL lines, with what the prompt will say."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.vqa_items import plain_question
from llava.errors import LlavaError, amount
from llava.record_content import USER, as_text, images_of, read_named, record_options
from llava.records import Record, iter_records


@dataclass(frozen=True)
class Question:
    """One question. `text` is what the user says, one `<image>` per image; `images` as `record_images` gives them.

    `system` takes the place of the template's system text, as in training; `options` are those of a multiple-choice
    question.
    """

    id: int | str
    text: str
    images: tuple[Any, ...] = ()
    answer_type: str | None = None
    system: str | None = None
    options: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """The question without image tags."""
        return plain_question(self.text)


def read_med_questions(path: str | Path) -> list[Question]:
    """The first question of each LLaVA-Med record (`id`, `image`, `conversations`)."""
    return _read(path, _from_med)


def read_line_questions(path: str | Path) -> list[Question]:
    """Questions of a JSONL file: `question_id`, `text` and, where there is one, `image`."""
    return _read(path, _from_line)


def chunk_of(questions: Sequence[Question], chunks: int, index: int) -> list[Question]:
    """Part `index` (from 0) of `chunks` nearly equal parts in order; late parts can be empty."""
    if chunks < 1 or not 0 <= index < chunks:
        raise LlavaError(f"--chunk-idx is {index} of --num-chunks {chunks}; give 0 to {max(chunks - 1, 0)}")
    size = math.ceil(len(questions) / chunks)
    return list(questions[index * size : (index + 1) * size])


def _read(path, make) -> list[Question]:
    questions = [make(record, f"{path} record {index}") for index, record in enumerate(iter_records(path))]
    if not questions:
        raise LlavaError(f"{path}: no questions")
    _refuse_doubled(questions, path)
    return questions


def _refuse_doubled(questions: Iterable[Question], path) -> None:
    # Compared as text: answers are joined to questions that way.
    doubled = [key for key, count in Counter(str(question.id) for question in questions).items() if count > 1]
    if doubled:
        stand = amount(len(doubled), "id stands", "ids stand")
        raise LlavaError(f"{path}: {stand} more than once, first {doubled[0]!r}; make them unique")


def _from_med(record: Record, where: str) -> Question:
    key, dialogue = read_named(record, where)
    asked = next((turn.text for turn in dialogue.turns if turn.role == USER), None)
    if asked is None:
        raise LlavaError(f'{where} ("{key}"): the conversation holds no question')
    return _question(key, asked, record, where, dialogue.system)


def _from_line(record: Record, where: str) -> Question:
    missing = [key for key in ("question_id", "text") if record.get(key) is None]
    if missing:
        raise LlavaError(f'{where}: no "{missing[0]}"; expected {{"question_id", "text", "image"}}')
    return _question(record["question_id"], record["text"], record, where)


def _question(key, text, record: Record, where: str, system: str | None = None) -> Question:
    """The question with its tags checked against its images; a text without tags gets them in front."""
    if isinstance(key, (list, dict)):
        raise LlavaError(f"{where}: the id is a {type(key).__name__}; give a text or a number")
    if isinstance(text, (list, dict)):
        raise LlavaError(f'{where} ("{key}"): the question is a {type(text).__name__}; give a text')
    images = tuple(images_of(record, f'{where} ("{key}")'))
    text = as_text(text).strip()
    tags = text.count(DEFAULT_IMAGE_TOKEN)
    if images and not tags:
        text = "\n".join([*[DEFAULT_IMAGE_TOKEN] * len(images), text])
    elif tags != len(images):
        raise LlavaError(
            f'{where} ("{key}"): {tags} {DEFAULT_IMAGE_TOKEN} in the question and {amount(len(images), "image")}; '
            f"give each image its tag, or none"
        )
    answer_type = record.get("answer_type")
    answer_type = None if answer_type is None else str(answer_type).strip().upper()
    try:
        options = tuple(record_options(record))
    except LlavaError as error:
        raise LlavaError(f'{where} ("{key}"): {error}') from error
    return Question(key, text, images, answer_type, system, options)
