"""Both metric sets over joined questions and answers, with counts, intervals, groups and one row per item."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from llava.eval.metrics.intervals import RESAMPLES, bootstrap_interval
from llava.eval.metrics.paper import Candidates, PaperItem, paper_item, paper_values, percent
from llava.eval.metrics.strict import StrictItem, strict_item, strict_values

SETS = ("paper", "strict")
HEADLINE = {
    "paper": {"open": "recall", "closed": "yes/no accuracy"},
    "strict": {"open": "open recall", "closed": "closed accuracy"},
}
"""The two numbers of each set that the published tables hold."""


@dataclass(frozen=True)
class Number:
    """A mean in percent over `count` questions with its bootstrap interval; None where nothing counts."""

    value: float | None
    low: float | None
    high: float | None
    count: int


@dataclass
class Scores:
    """What a set of answers reaches. `values` holds each number's score per question, fractions or None."""

    questions: int
    open: int
    closed: int
    numbers: dict[str, dict[str, Number]]
    values: dict[str, dict[str, list[float | None]]] = field(repr=False)
    rows: list[dict] = field(repr=False)
    groups: dict[str, dict[str, dict]] = field(default_factory=dict, repr=False)

    def headline(self, metric_set: str, kind: str) -> Number:
        """The number that tables show: `metric_set` "paper" or "strict", `kind` "open" or "closed"."""
        return self.numbers[metric_set][HEADLINE[metric_set][kind]]

    def as_dict(self) -> dict:
        """Without the values and rows, for a JSON file."""
        numbers = {name: {key: asdict(n) for key, n in part.items()} for name, part in self.numbers.items()}
        counts = {"questions": self.questions, "open": self.open, "closed": self.closed}
        return counts | numbers | ({"groups": self.groups} if self.groups else {})


def score_items(
    joined: Sequence,
    candidates: Iterable[object] | None = None,
    *,
    script: str = "run_eval_batch",
    group_by: Sequence[str] = (),
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Scores:
    """Score `JoinedItem`s.

    Args:
        candidates: open answers of the training split; without them the paper set has no candidate score.
        script: whose rules the paper set follows.
        group_by: record fields (such as "question_type", "image_organ") to give tables for.
        clusters: one key per question; the bootstrap then draws whole clusters (images, say).
        resamples: of the bootstrap; 0 leaves intervals out.
    """
    types = [entry.item.answer_type for entry in joined]
    pool = None if candidates is None else Candidates(candidates)
    paper, strict = [], []
    for entry in progress(joined):
        paper.append(paper_item(entry.prediction, entry.item.answer, pool))
        strict.append(strict_item(entry.prediction, entry.item.answer, entry.item.question))
    values = {"paper": paper_values(paper, types, script), "strict": strict_values(strict, types)}
    numbers = {
        name: {key: _number(column, clusters, resamples, seed) for key, column in part.items()}
        for name, part in values.items()
    }
    return Scores(
        questions=len(types),
        open=types.count("OPEN"),
        closed=types.count("CLOSED"),
        numbers=numbers,
        values=values,
        rows=[_row(entry, p, s) for entry, p, s in zip(joined, paper, strict)],
        groups={name: _group(joined, name, values) for name in group_by},
    )


def group_keys(joined: Sequence, limit: int = 40) -> list[str]:
    """Record fields that tell questions apart into at least two and at most `limit` groups."""
    fields: dict[str, set] = {}
    for entry in joined:
        for name, value in entry.item.fields.items():
            if isinstance(value, (str, bool, int)):
                fields.setdefault(name, set()).add(value)
    few = max(2, min(limit, len(joined) // 2))
    return [name for name, found in fields.items() if name not in _NOT_GROUPS and 2 <= len(found) <= few]


_NOT_GROUPS = {"img_id", "triple", "phrase_type_id", "answer"}


def _number(column, clusters, resamples: int, seed: int) -> Number:
    interval = bootstrap_interval(column, clusters, resamples=resamples, seed=seed) if resamples else None
    low, high = (None, None) if interval is None else (100 * interval[0], 100 * interval[1])
    return Number(percent(column), low, high, sum(value is not None for value in column))


def _row(entry, paper: PaperItem, strict: StrictItem) -> dict:
    item = entry.item
    return {
        "question_id": item.id,
        "image": item.image,
        "answer_type": item.answer_type,
        "question": item.question,
        "reference": item.answer,
        "prediction": entry.prediction,
        "paper": paper.as_dict(),
        "strict": strict.as_dict(),
    }


def _group(joined, name: str, values) -> dict[str, dict]:
    """Headline means of each value of the field; a record without it is under "-"."""
    keys = [str(entry.item.fields.get(name, "-")).strip() for entry in joined]
    table = {}
    for key in sorted(set(keys)):
        inside = [index for index, found in enumerate(keys) if found == key]
        row: dict = {"questions": len(inside)}
        for metric_set, names in HEADLINE.items():
            for kind, number in names.items():
                column = [values[metric_set][number][index] for index in inside]
                row[kind] = sum(value is not None for value in column)
                row[f"{metric_set} {kind}"] = percent(column)
        table[key] = row
    return table
