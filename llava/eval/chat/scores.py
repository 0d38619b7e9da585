"""What a judge's replies say: the score line parsed, and chat evaluations summed up by group.

Rows that can't be read are counted and left out; the published summaries average them in as −1, or crash.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from llava.constants import FIGURE_DOMAINS
from llava.record_content import as_text, figure_domain
from llava.records import Record

UNREADABLE = (-1.0, -1.0)
QUESTION_TYPES = ("conversation", "detailed_description")
OVERALL = "overall"
JUDGE_KEYS = ("gpt_eval", "result")
"""Where a row holds the judge's reply: v1.5's name, v1.0's name."""


def parse_scores(reply: str) -> tuple[float, float]:
    """(reference's score, model's score) of the reply's first line, or `UNREADABLE`.

    The line holds two numbers with exactly one blank or comma between them and nothing else; anything that
    Python reads as a float is a number.
    """
    fields = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(fields) != 2:
        return UNREADABLE
    try:
        return float(fields[0]), float(fields[1])
    except ValueError:
        return UNREADABLE


def is_usable(scores: Sequence[float]) -> bool:
    """Whether a relative score can be computed: two finite numbers, none below zero, the reference's above it."""
    return len(scores) == 2 and all(math.isfinite(score) for score in scores) and scores[0] > 0 and scores[1] >= 0


@dataclass(frozen=True)
class GroupScores:
    """One group of a chat evaluation. `pred_relative_score` is the mean of model/reference × 100 (v1.5's table),
    `ratio_of_means` the ratio of the two means × 100 (LLaVA's)."""

    gpt4_score: float
    pred_score: float
    pred_relative_score: float
    ratio_of_means: float
    data_size: int


@dataclass
class ChatSummary:
    """Scores by group (question types, domains, overall; empty ones absent) and how many rows were left out."""

    groups: dict[str, GroupScores]
    rows: int
    unreadable: int
    zero_reference: int
    without_domain: int
    left_out_ids: list = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)


def summarize_chat(rows: Iterable[Record]) -> ChatSummary:
    """Sum up rows of a judged chat evaluation: `type`, `domain` and the reply under one of `JUDGE_KEYS`."""
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    count = unreadable = zero = without_domain = 0
    left_out = []
    for row in rows:
        count += 1
        pair = row_scores(row)
        if not is_usable(pair):
            zero += pair[0] == 0
            unreadable += pair[0] != 0
            left_out.append(row.get("question_id"))
            continue
        without_domain += figure_domain(row) is None
        for group in groups_of(row):
            scores[group].append(pair)
    known = [*QUESTION_TYPES, *FIGURE_DOMAINS]
    order = [*known, *(name for name in scores if name not in known and name != OVERALL), OVERALL]
    groups = {name: _group_scores(scores[name]) for name in order if scores.get(name)}
    return ChatSummary(groups, count, unreadable, zero, without_domain, left_out)


def groups_of(row: Record) -> list[str]:
    """The groups that a row counts in, each once: its type, its domain, and all rows."""
    kind = row.get("type")
    given = (None if kind is None else as_text(kind), figure_domain(row), OVERALL)
    return list(dict.fromkeys(name for name in given if name is not None))


def row_scores(row: Record) -> tuple[float, float]:
    """(reference's score, model's) of a row: what the scorer read (`scores`), else parsed from the reply."""
    if "scores" in row:
        scores = row["scores"]
        are_two = (
            isinstance(scores, (list, tuple)) and len(scores) == 2 and all(type(s) in (int, float) for s in scores)
        )
        return (float(scores[0]), float(scores[1])) if are_two else UNREADABLE
    return parse_scores(judge_reply(row) or "")


def judge_reply(row: Record) -> str | None:
    """The judge's reply of a row, under either name."""
    return next((row[key] for key in JUDGE_KEYS if isinstance(row.get(key), str)), None)


def _group_scores(pairs: list[tuple[float, float]]) -> GroupScores:
    size = len(pairs)
    reference, model = sum(a for a, _ in pairs) / size, sum(b for _, b in pairs) / size
    relative = sum(b / a for a, b in pairs) / size * 100
    return GroupScores(reference, model, relative, model / reference * 100, size)
