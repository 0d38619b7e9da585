"""Scores files of judged chat answers, summed up and set side by side."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import LlavaError, amount
from llava.eval.chat.scores import OVERALL, ChatSummary, groups_of, is_usable, row_scores, summarize_chat
from llava.eval.metrics.intervals import bootstrap_interval
from llava.eval.reports.tables import text_table
from llava.records import Record, read_records


@dataclass
class Judged:
    """One scores file: summary, 95 % intervals of the relative score by group, and agreement of the two orders.

    `half_read` counts the questions that were judged in both orders and could be read in one alone.
    """

    name: str
    judge: str
    summary: ChatSummary
    intervals: dict[str, tuple[float, float] | None]
    agreement: dict | None
    half_read: int = 0

    def as_dict(self) -> dict:
        return {
            "file": self.name,
            "judge": self.judge,
            **self.summary.as_dict(),
            "intervals": self.intervals,
            "agreement": self.agreement,
            "half_read": self.half_read,
        }


def read_scores_file(path: str | Path) -> Judged:
    """Read and sum up one scores file; of judgements in both orders each question counts once, with their mean.

    Raises:
        LlavaError: no rows, or a question that is judged twice in one order.
    """
    rows = read_records(path)
    if not rows:
        raise LlavaError(f"{path}: holds no rows")
    orders = Counter((str(row["question_id"]), bool(row.get("swapped"))) for row in rows if _has_id(row))
    if doubled := [key for (key, _), count in orders.items() if count > 1]:
        which = amount(len(doubled), "question is", "questions are")
        raise LlavaError(
            f"{path}: {which} judged more than once in one order, first {doubled[0]!r}; "
            f"give the judgements of each model a file of their own"
        )
    judges = Counter(str(row.get("judge_model") or "not recorded") for row in rows)
    agreement = order_agreement(rows)
    readable = [sum(is_usable(row_scores(row)) for row in same) / len(same) for same in _by_question(rows)]
    rows = merge_orders(rows)
    summary = summarize_chat(rows)
    intervals = {}
    for group in summary.groups:
        pairs = [row_scores(row) for row in rows if group in groups_of(row)]
        ratios = [pair[1] / pair[0] * 100 for pair in pairs if is_usable(pair)]
        intervals[group] = bootstrap_interval(ratios)
    half_read = sum(0 < share < 1 for share in readable)
    return Judged(str(path), ", ".join(judges), summary, intervals, agreement, half_read)


def merge_orders(rows: list[Record]) -> list[Record]:
    """One row a question: where it was judged in both orders, the mean of the scores that could be read."""
    merged = []
    for same in _by_question(rows):
        pairs = [row_scores(row) for row in same]
        usable = [pair for pair in pairs if is_usable(pair)]
        if len(same) > 1 and usable:
            scores = [sum(pair[side] for pair in usable) / len(usable) for side in (0, 1)]
            merged.append({**same[0], "scores": scores})
        else:
            merged.append(same[0])
    return merged


def _by_question(rows: list[Record]) -> list[list[Record]]:
    """The rows of each question; one without an id stays alone."""
    found: dict[Any, list[Record]] = {}
    for index, row in enumerate(rows):
        found.setdefault(str(row["question_id"]) if _has_id(row) else index, []).append(row)
    return list(found.values())


def _has_id(row: Record) -> bool:
    return row.get("question_id") is not None


def order_agreement(rows: list[Record]) -> dict | None:
    """How far the judge agrees with itself when the answers change places; None if it was asked in one order.

    `same_winner` is the share of questions where the same answer wins (or both tie), `bias_to_first` the mean of
    how much higher an answer scores when it stands first.
    """
    orders: dict = {}
    for row in rows:
        pair = row_scores(row)
        if "swapped" in row and _has_id(row) and is_usable(pair):
            orders.setdefault(str(row["question_id"]), {})[row["swapped"]] = pair
    both = [(pairs[False], pairs[True]) for pairs in orders.values() if len(pairs) == 2]
    if not both:
        return None

    def sign(pair):
        return (pair[1] > pair[0]) - (pair[1] < pair[0])

    same = sum(sign(plain) == sign(swapped) for plain, swapped in both)
    bias = sum((plain[0] - swapped[0]) + (swapped[1] - plain[1]) for plain, swapped in both) / 2
    return {"questions": len(both), "same_winner": same / len(both), "bias_to_first": bias / len(both)}


def summary_table(judged: list[Judged]) -> str:
    """The groups as rows; for each file the relative score (mean of ratios) with interval, ratio of means, count."""
    names = list(dict.fromkeys(group for one in judged for group in one.summary.groups))
    names = [name for name in names if name != OVERALL] + [OVERALL]
    header = ["group"]
    for one in judged:
        header += [f"relative {one.name}" if len(judged) > 1 else "relative", "95 %", "ratio of means", "n"]
    rows = []
    for name in names:
        cells = [name]
        for one in judged:
            group = one.summary.groups.get(name)
            if group is None:
                cells += ["–", "", "", "0"]
                continue
            interval = one.intervals[name]
            cells += [f"{group.pred_relative_score:.1f}", f"{interval[0]:.1f}–{interval[1]:.1f}" if interval else "-"]
            cells += [f"{group.ratio_of_means:.1f}", str(group.data_size)]
        rows.append(cells)
    lines = [text_table(header, rows)]
    if any(interval is None for one in judged for interval in one.intervals.values()):
        lines.append("a single question gives no interval")
    for one in judged:
        summary = one.summary
        lines.append(
            f"{one.name}: judge {one.judge}; {amount(summary.rows, 'question')}, {summary.unreadable} unparsed and "
            f"{summary.zero_reference} with a reference score of zero left out, {summary.without_domain} without domain"
        )
        if one.agreement:
            agreement = one.agreement
            lines.append(
                f"  both orders of {amount(agreement['questions'], 'question')}: the same winner in "
                f"{agreement['same_winner']:.0%}, {agreement['bias_to_first']:+.2f} points for standing first"
            )
        if one.half_read:
            half_read = amount(one.half_read, "question")
            lines.append(f"  {half_read} could be read in one of both orders alone, counted with that")
    return "\n".join(lines)
