"""Questions and answers joined by id: what is missing, doubled or unknown is said, never guessed.

The published scripts join by order, so one lost line shifts every score.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.vqa_items import VqaItem
from llava.errors import LlavaError
from llava.eval.metrics.registry import CHOICE
from llava.records import Record, iter_records


@dataclass(frozen=True)
class JoinedItem:
    """A question, its reference and a model's answer (`record` is the answer's line)."""

    item: VqaItem
    prediction: str
    record: Record = field(default_factory=dict)


def read_answers(path: str | Path) -> list[Record]:
    """The lines of an answer file; errors name file and line. A text that is null is no answer, not the word "None".

    Raises:
        LlavaError: no answers; a line without id or text; probabilities in its `metadata` that aren't some.
    """
    answers = []
    for number, record in enumerate(iter_records(path), 1):
        missing = [key for key in ("question_id", "text") if key not in record]
        if missing or record["question_id"] is None:
            key = missing[0] if missing else "question_id"
            raise LlavaError(f'{path} answer {number}: no "{key}"; expected {{"question_id": …, "text": …}}')
        if isinstance(record["text"], (list, dict)):
            raise LlavaError(f'{path} answer {number}: "text" is a {type(record["text"]).__name__}; expected a text')
        _check_probabilities(metadata_of(record), f"{path} answer {number}")
        answers.append(record)
    if not answers:
        raise LlavaError(f"{path}: the file holds no answers")
    return answers


def metadata_of(record: Record) -> dict[str, Any]:
    """What an answer's line says beside the text (`p_yes`, `option_letters`, …); nothing where its `metadata` is no
    object, as in other programs' files."""
    metadata = record.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _check_probabilities(metadata: dict[str, Any], where: str) -> None:
    chance = metadata.get("p_yes")
    if chance is not None and not (_is_number(chance) and 0 <= chance <= 1):
        raise LlavaError(f'{where}: "p_yes" is {chance!r}; expected a number from 0 to 1')
    for name in ("option_letters", "option_texts"):
        given = metadata.get(name)
        if given is not None and not (isinstance(given, list) and given and all(map(_is_likelihood, given))):
            raise LlavaError(f'{where}: "{name}" has to be a list of {{"log_probability": …, "tokens": …}}')


def _is_likelihood(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(name)) for name in ("log_probability", "tokens"))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def join(
    items: list[VqaItem], answers: list[Record], gt: str | Path, pred: str | Path, on_missing: str = "error"
) -> list[JoinedItem]:
    """The questions in order, each with its answer.

    Args:
        gt, pred: the files that both are from, for messages.
        on_missing: a question without answer is an "error", is left out ("skip") or has an empty answer ("wrong").

    Raises:
        LlavaError: an id of the answers stands twice or isn't one of the questions'; or, by `on_missing`, an answer
            is missing. The message gives the number of each and the first id.
    """
    # One writer's 17 is another's "17": ids are compared as text.
    ids = {str(item.id) for item in items}
    counts = Counter(str(answer["question_id"]) for answer in answers)
    given = {str(answer["question_id"]): answer for answer in answers if answer["text"] is not None}
    doubled = [key for key, count in counts.items() if count > 1]
    unknown = [key for key in counts if key not in ids]
    missing = [str(item.id) for item in items if str(item.id) not in counts]
    null = [str(item.id) for item in items if str(item.id) in counts and str(item.id) not in given]
    without = len(missing) + len(null)
    if doubled or unknown or (without and on_missing == "error") or without == len(items):
        kinds = (("missing", missing), ("null", null), ("doubled", doubled), ("unknown", unknown))
        found = ", ".join(f"{len(keys)} {kind} (first {keys[0]!r})" for kind, keys in kinds if keys)
        hint = "; --on-missing skip or wrong scores the rest" if not (doubled or unknown) else ""
        hint = "" if without == len(items) else hint
        raise LlavaError(f"the ids of {pred} don't match the {len(items)} questions of {gt}: {found}{hint}")
    joined = []
    for item in items:
        answer = given.get(str(item.id))
        if answer is not None:
            joined.append(JoinedItem(item, str(answer["text"]), answer))
        elif on_missing == "wrong":
            joined.append(JoinedItem(item, ""))
    return joined


def clusters_of(joined: Sequence[JoinedItem], unit: str) -> list[Hashable] | None:
    """What the bootstrap is to draw: a key for each question, the same for all that are drawn together.

    Of "image" these are the questions about one image; of "question" the records that ask one question with its options
    in several orders (`source_id`). None where each is drawn by itself.
    """
    if unit == "image":
        return [("image", entry.item.image) if entry.item.image else _question_key(entry) for entry in joined]
    if any(_source(entry) is not None for entry in joined):
        return [_question_key(entry) for entry in joined]
    return None


def _question_key(entry: JoinedItem) -> Hashable:
    source = _source(entry)
    return ("id", str(entry.item.id)) if source is None else ("source", str(source))


def _source(entry: JoinedItem) -> Any:
    return entry.item.fields.get("source_id") if entry.item.answer_type == CHOICE else None
