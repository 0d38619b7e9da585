"""Every metric over joined questions and answers, with counts, intervals, groups and one row per item."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llava.eval.metrics.intervals import bootstrap_interval, share_interval
from llava.eval.metrics.joined import JoinedItem
from llava.eval.metrics.paper import Candidates, paper_scores
from llava.eval.metrics.registry import (
    CHOICE,
    CLOSED,
    OPEN,
    SETS,
    Answer,
    Metric,
    all_metrics,
    headline_name,
    metrics_of,
)
from llava.eval.metrics.strict import strict_scores
from llava.eval.scoring_flags import RESAMPLES


@dataclass(frozen=True)
class Number:
    """A mean in the metric's unit over `count` questions with its bootstrap interval; None where nothing counts. A
    single question (image, where images are drawn) has a mean and no interval."""

    value: float | None
    low: float | None
    high: float | None
    count: int


@dataclass
class Scores:
    """What a set of answers reaches, by metric set and name. `values` holds each number's score per question.

    *paper* and *strict* hold all their numbers; of the further metrics there are those that count a question.
    """

    questions: int
    open: int
    closed: int
    choice: int
    numbers: dict[str, dict[str, Number]]
    values: dict[str, dict[str, list[float | None]]] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    groups: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict, repr=False)

    def headline(self, metric_set: str, kind: str) -> Number:
        """The number that published tables show: `metric_set` "paper" or "strict", `kind` "open" or "closed"."""
        return self.numbers[metric_set][headline_name(metric_set, kind)]

    @property
    def lack_interval(self) -> bool:
        """Whether a number has no interval."""
        numbers = (number for part in self.numbers.values() for number in part.values())
        return any(number.value is not None and number.low is None for number in numbers)

    def number(self, metric: Metric) -> Number | None:
        """A metric's number, None if it counts no question here."""
        return self.numbers.get(metric.metric_set, {}).get(metric.name)

    @property
    def counts(self) -> str:
        """How many questions of which kind: "2 open, 2 closed"."""
        more = f", {self.choice} multiple-choice" if self.choice else ""
        return f"{self.open} open, {self.closed} closed{more}"

    def as_dict(self) -> dict[str, Any]:
        """Without the values and rows, for a JSON file."""
        numbers = {name: {key: asdict(n) for key, n in part.items()} for name, part in self.numbers.items()}
        counts = {"questions": self.questions, "open": self.open, "closed": self.closed, "choice": self.choice}
        return counts | numbers | ({"groups": self.groups} if self.groups else {})


def headlines(several: Iterable[Scores]) -> list[Metric]:
    """The metrics that tables of several answer files show: the published ones, and further ones that one has."""
    several = list(several)
    return [m for m in all_metrics() if m.is_headline and any(scores.number(m) is not None for scores in several)]


def score_items(
    joined: Sequence[JoinedItem],
    candidates: Iterable[object] | None = None,
    *,
    script: str = "run_eval_batch",
    group_by: Sequence[str] = (),
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[Iterable[Answer]], Iterable[Answer]] = iter,
) -> Scores:
    """Score `JoinedItem`s.

    Args:
        candidates: open answers of the training split; without them the paper set has no candidate score.
        script: whose rules the paper set follows.
        group_by: record fields (such as "question_type", "image_organ") to give tables for.
        clusters: one key per question; the bootstrap then draws whole clusters (images, say).
        resamples: of the bootstrap; 0 leaves intervals out.
    """
    pool = None if candidates is None else Candidates(candidates)
    answers = [_answer(entry, script, pool) for entry in joined]
    for answer in progress(answers):  # what takes long, and what most metrics share
        answer.once(paper_scores)
        answer.once(strict_scores)
    found = {}
    for metric in metrics_of(script):
        column = metric.values(answers)
        if metric.metric_set != "further" or any(value is not None for value in column):
            found[metric] = column
    values: dict[str, dict[str, list[float | None]]] = {name: {} for name in SETS}
    numbers: dict[str, dict[str, Number]] = {name: {} for name in SETS}
    for metric, column in found.items():
        values[metric.metric_set][metric.name] = column
        numbers[metric.metric_set][metric.name] = _number(metric, column, clusters, resamples, seed)
    types = [answer.answer_type for answer in answers]
    return Scores(
        questions=len(types),
        open=types.count(OPEN),
        closed=types.count(CLOSED),
        choice=types.count(CHOICE),
        numbers=numbers,
        values=values,
        rows=[_row(answer, values["further"], index) for index, answer in enumerate(answers)],
        groups={name: _group(joined, name, found) for name in group_by},
    )


def group_keys(joined: Sequence[JoinedItem], limit: int = 40) -> list[str]:
    """Record fields that tell questions apart into at least two and at most `limit` groups."""
    fields: dict[str, set[str | bool | int]] = {}
    for entry in joined:
        for name, value in entry.item.fields.items():
            if isinstance(value, (str, bool, int)):
                fields.setdefault(name, set()).add(value)
    few = max(2, min(limit, len(joined) // 2))
    return [name for name, found in fields.items() if name not in _NOT_GROUPS and 2 <= len(found) <= few]


_NOT_GROUPS = {"img_id", "triple", "phrase_type_id", "answer", "source_id"}


def _answer(entry: JoinedItem, script: str, pool: Candidates | None) -> Answer:
    item = entry.item
    return Answer(
        prediction=entry.prediction,
        reference=item.answer,
        answer_type=item.answer_type,
        question=item.question,
        id=item.id,
        image=item.image,
        fields=item.fields,
        record=entry.record,
        script=script,
        candidates=pool,
    )


def _number(
    metric: Metric, column: list[float | None], clusters: Sequence[Hashable] | None, resamples: int, seed: int
) -> Number:
    interval_of = share_interval if metric.unit == "%" else bootstrap_interval
    interval = interval_of(column, clusters, resamples=resamples, seed=seed) if resamples else None
    low, high = (None, None) if interval is None else (metric.scale * interval[0], metric.scale * interval[1])
    return Number(metric.mean(column), low, high, sum(value is not None for value in column))


def _row(answer: Answer, further: dict[str, list[float | None]], index: int) -> dict[str, Any]:
    counted = {name: column[index] for name, column in further.items() if column[index] is not None}
    return {
        "question_id": answer.id,
        "image": answer.image,
        "answer_type": answer.answer_type,
        "question": answer.question,
        "reference": answer.reference,
        "prediction": answer.prediction,
        "paper": answer.once(paper_scores).as_dict(),
        "strict": answer.once(strict_scores).as_dict(),
        "further": counted,
    }


def _group(
    joined: Sequence[JoinedItem], name: str, found: dict[Metric, list[float | None]]
) -> dict[str, dict[str, Any]]:
    """Headline means of each value of the field; a record without it is under "-"."""
    places: dict[str, list[int]] = {}
    for index, entry in enumerate(joined):
        value = entry.item.fields.get(name)
        places.setdefault("-" if value is None else str(value).strip(), []).append(index)
    table = {}
    for key, inside in sorted(places.items()):
        kinds = [joined[index].item.answer_type for index in inside]
        row: dict[str, Any] = {"questions": len(inside)}
        row |= {kind.lower(): kinds.count(kind) for kind in (OPEN, CLOSED, CHOICE)}
        for metric, column in found.items():
            if metric.is_headline:
                row[metric.title] = metric.mean(column[index] for index in inside)
        table[key] = row
    return table
