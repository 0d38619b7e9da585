"""Scores on the part of the test set that an audit finds clean, next to those on all of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.data.audit_checks import audit_splits
from llava.data.audit_text import audit_lines
from llava.data.vqa_items import read_vqa_items
from llava.errors import LlavaError
from llava.eval.metrics.joined import clusters_of
from llava.eval.metrics.score import Scores, headlines, score_items
from llava.eval.reports.evaluation import Evaluation, read_candidates
from llava.eval.reports.tables import count_cells, kinds_of, number_cell, text_table
from llava.records import read_json


@dataclass
class CleanScores:
    """The audit and, by subset name, its scores; None for a subset without questions."""

    audit: dict[str, Any]
    all_questions: Scores
    subsets: dict[str, Scores | None]

    def as_dict(self) -> dict[str, Any]:
        found = {name: scores.as_dict() if scores else {"questions": 0} for name, scores in self.subsets.items()}
        audit = {key: value for key, value in self.audit.items() if key not in {"items", "subsets"}}
        return {"audit": audit, "scores": found}

    def text(self) -> str:
        shown, kinds = headlines([self.all_questions]), kinds_of([self.all_questions])
        rows = []
        for name, scores in (("all", self.all_questions), *self.subsets.items()):
            cells = [number_cell(scores.number(metric)) if scores else "no question" for metric in shown]
            rows.append([name, *count_cells(scores, kinds), *cells])
        header = ["test questions", *kinds, *(metric.heading for metric in shown)]
        return "\n".join([*audit_lines(self.audit), "", text_table(header, rows)])


def read_audit(path: str | Path) -> dict[str, Any]:
    """What `llava.data.audit --output` wrote."""
    audit = read_json(path)
    if not isinstance(audit, dict) or "subsets" not in audit or "items" not in audit:
        raise LlavaError(f"{path}: not an audit; make one with llava-med audit … --output FILE")
    return audit


def audit_against(
    evaluation: Evaluation, train: str | Path | None, image_folder: str | Path | None = None
) -> dict[str, Any]:
    """The audit of an evaluation's test file against the training file, made here."""
    if not train:
        raise LlavaError("--audit needs the audit's JSON file, or --train FILE to audit against")
    tested = read_vqa_items(evaluation.gt)
    return audit_splits(read_vqa_items(train, later_turns=True), tested, image_folder, image_folder)


def not_audited(evaluation: Evaluation, audit: dict[str, Any]) -> list[str]:
    """Ids of the questions answered that an audit has not looked at."""
    audited = {str(row["id"]) for row in audit["items"]}
    return [str(entry.item.id) for entry in evaluation.joined if str(entry.item.id) not in audited]


def check_audited(evaluation: Evaluation, audit: dict[str, Any], path: str | Path) -> None:
    """Raises a LlavaError if the audit, read from `path`, is of other questions."""
    if unknown := not_audited(evaluation, audit):
        raise LlavaError(
            f"{path}: the audit is of other questions than {evaluation.gt}: {len(unknown)} are not in it (first "
            f"{unknown[0]!r}); give the one made with llava-med audit … --test {evaluation.gt}"
        )


def score_clean_subset(evaluation: Evaluation, audit: dict[str, Any], path: str | Path) -> CleanScores:
    """Score each clean subset of an audit, read from `path`.

    Raises:
        LlavaError: `check_audited`'s.
    """
    check_audited(evaluation, audit, path)
    settings = evaluation.settings
    candidates = None if settings["candidate"] is None else read_candidates(settings["candidate"])
    subsets: dict[str, Scores | None] = {}
    for name, ids in audit["subsets"].items():
        wanted = {str(key) for key in ids}
        part = [entry for entry in evaluation.joined if str(entry.item.id) in wanted]
        subsets[name] = None
        if part:
            subsets[name] = score_items(
                part,
                candidates,
                script=settings["script"],
                clusters=clusters_of(part, settings["unit"]),
                resamples=settings["resamples"],
                seed=settings["bootstrap_seed"],
            )
    return CleanScores(audit, evaluation.scores, subsets)
