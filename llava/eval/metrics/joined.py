"""Questions and answers joined by id: what is missing, doubled or unknown is said, never guessed.

The published scripts join by order, so one lost line shifts every score.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from llava.data.vqa_items import VqaItem, read_vqa_items
from llava.errors import LlavaError
from llava.records import Record, iter_records

ON_MISSING = ("error", "skip", "wrong")


@dataclass(frozen=True)
class JoinedItem:
    """A question, its reference and a model's answer (`record` is the answer's line)."""

    item: VqaItem
    prediction: str
    record: Record = field(default_factory=dict)


def read_joined(gt: str | Path, pred: str | Path, on_missing: str = "error") -> list[JoinedItem]:
    """The questions of `gt` in order, each with its answer from `pred`.

    Args:
        gt: LLaVA-Med records or raw VQA-RAD/SLAKE rows.
        pred: answers, `{"question_id", "text", …}` per line (or a JSON list).
        on_missing: a question without answer is an "error", is left out ("skip") or has an empty answer ("wrong").

    Raises:
        LlavaError: a file is bad; an id of `pred` stands twice or isn't in `gt`; or, by `on_missing`, an answer
            is missing. The message gives the number of each and the first id.
    """
    items = read_vqa_items(gt)
    return join(items, read_answers(pred), gt, pred, on_missing)


def read_answers(path: str | Path) -> list[Record]:
    """The lines of an answer file; errors name file and line."""
    answers = []
    for number, record in enumerate(iter_records(path), 1):
        if "question_id" not in record or "text" not in record:
            missing = next(key for key in ("question_id", "text") if key not in record)
            raise LlavaError(f'{path} answer {number}: no "{missing}"; expected {{"question_id": …, "text": …}}')
        answers.append(record)
    if not answers:
        raise LlavaError(f"{path}: the file holds no answers")
    return answers


def join(
    items: list[VqaItem], answers: list[Record], gt: str | Path, pred: str | Path, on_missing: str = "error"
) -> list[JoinedItem]:
    """`read_joined` on what was read; the paths serve the messages."""
    # One writer's 17 is another's "17": ids are compared as text.
    ids = {str(item.id) for item in items}
    counts = Counter(str(answer["question_id"]) for answer in answers)
    doubled = [key for key, count in counts.items() if count > 1]
    unknown = [key for key in counts if key not in ids]
    missing = [str(item.id) for item in items if str(item.id) not in counts]
    if doubled or unknown or (missing and on_missing == "error") or len(missing) == len(items):
        kinds = (("missing", missing), ("doubled", doubled), ("unknown", unknown))
        found = ", ".join(f"{len(keys)} {kind} (first {keys[0]!r})" for kind, keys in kinds if keys)
        hint = "; --on-missing skip or wrong scores the rest" if not (doubled or unknown) else ""
        hint = "" if len(missing) == len(items) else hint
        raise LlavaError(f"the ids of {pred} don't match the {len(items)} questions of {gt}: {found}{hint}")
    by_id = {str(answer["question_id"]): answer for answer in answers}
    joined = []
    for item in items:
        answer = by_id.get(str(item.id))
        if answer is not None:
            joined.append(JoinedItem(item, str(answer["text"]), answer))
        elif on_missing == "wrong":
            joined.append(JoinedItem(item, ""))
    return joined
