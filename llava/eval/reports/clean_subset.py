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
from llava.eval.reports.tables import number_cell, text_table
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
        shown = headlines([self.all_questions])
        rows = []
        for name, scores in (("all", self.all_questions), *self.subsets.items()):
            if scores is None:
                rows.append([name, "0", "0", *("no question" for _ in shown)])
            else:
                cells = [number_cell(scores.number(metric)) for metric in shown]
                rows.append([name, str(scores.open), str(scores.closed), *cells])
        header = ["test questions", "open", "closed", *(metric.heading for metric in shown)]
        return "\n".join([*audit_lines(self.audit), "", text_table(header, rows)])


def is_audited(evaluation: Evaluation, audit_file: str | Path) -> bool:
    """Whether an audit is of the questions that were answered."""
    audit = _read_audit(audit_file)
    audited = {str(row["id"]) for row in audit["items"]}
    return all(str(entry.item.id) in audited for entry in evaluation.joined)


def _read_audit(audit_file: str | Path) -> dict[str, Any]:
    audit = read_json(audit_file)
    if not isinstance(audit, dict) or "subsets" not in audit or "items" not in audit:
        raise LlavaError(f"{audit_file}: not an audit; make one with python -m llava.data.audit … --output FILE")
    return audit


def score_clean_subset(
    evaluation: Evaluation,
    audit_file: str | Path | None = None,
    train: str | Path | None = None,
    image_folder: str | Path | None = None,
) -> CleanScores:
    """Score each clean subset of an audit.

    Args:
        audit_file: what `llava.data.audit --output` wrote; without it the audit is made here from `train`.

    Raises:
        LlavaError: neither is given, or the audit is of other questions.
    """
    if audit_file:
        audit = _read_audit(audit_file)
    elif train:
        tested = read_vqa_items(evaluation.gt)
        audit = audit_splits(read_vqa_items(train, later_turns=True), tested, image_folder, image_folder)
    else:
        raise LlavaError("--audit needs the audit's JSON file, or --train FILE to audit against")
    audited = {str(row["id"]) for row in audit["items"]}
    unknown = [str(entry.item.id) for entry in evaluation.joined if str(entry.item.id) not in audited]
    if unknown:
        raise LlavaError(
            f"{audit_file or train}: the audit is of other questions than {evaluation.gt}: "
            f"{len(unknown)} are not in it (first {unknown[0]!r})"
        )
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
