"""What the demo's three sets of answers reach, over the questions about findings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.vqa_items import read_vqa_items
from llava.eval.metrics.joined import join, read_answers
from llava.eval.metrics.score import Scores, score_items
from llava.eval.reports.tables import number_cell

RUNS = {"": "with images", "blind_": "blind: trained and asked with grey images", "nearest_": "nearest image"}
"""Prefix of a run's files, and its name."""


@dataclass
class RunScores:
    """One run: scores over finding questions and over the others, and a row per finding question."""

    name: str
    finding: Scores
    other: Scores
    rows: list[dict[str, Any]] = field(repr=False)


def score_runs(output: Path, resamples: int = 1000) -> dict[str, RunScores]:
    """Scores by prefix, of `<prefix>answers.jsonl` in `output`."""
    return {prefix: _score(output, prefix, resamples) for prefix in RUNS}


def results(scores: dict[str, RunScores], questions: int, seconds: float, seed: int) -> dict[str, float | int]:
    """What `results.json` holds: fractions of the *strict* set over so many finding questions."""
    content: dict[str, float | int] = {}
    for prefix, run in scores.items():
        for key, kind in (("closed_accuracy", "closed"), ("open_recall", "open")):
            content[prefix + key] = round((run.finding.headline("strict", kind).value or 0.0) / 100, 4)
    return content | {"questions": questions, "seconds": round(seconds, 1), "seed": seed}


def table(scores: dict[str, RunScores]) -> list[list[str]]:
    """Rows of text, the first of them headings."""
    rows = [["strict (%), finding questions", "closed accuracy", "open recall", "closed / open questions"]]
    for prefix, run in scores.items():
        numbers = [run.finding.headline("strict", kind) for kind in ("closed", "open")]
        rows.append([RUNS[prefix], *map(number_cell, numbers), f"{run.finding.closed} / {run.finding.open}"])
    return rows


def _score(output: Path, prefix: str, resamples: int) -> RunScores:
    questions, answers = output / "data" / "vqa_test.json", output / f"{prefix}answers.jsonl"
    joined = join(read_vqa_items(questions), read_answers(answers), questions, answers)
    finding = [entry for entry in joined if entry.item.fields["finding"]]
    other = [entry for entry in joined if not entry.item.fields["finding"]]
    scores = score_items(finding, resamples=resamples, group_by=["family", "template"])
    rows = [
        row | {"family": entry.item.fields["family"], "right": _is_right(row)}
        for row, entry in zip(scores.rows, finding)
    ]
    return RunScores(RUNS[prefix], scores, score_items(other, resamples=resamples), rows)


def _is_right(row: dict[str, Any]) -> bool:
    return row["strict"]["correct" if row["answer_type"] == "CLOSED" else "recall"] == 1.0
