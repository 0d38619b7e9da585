"""One answer file evaluated: read, join, score, and what is said about it. Commands and the report use it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.bars import tqdm
from llava.data.vqa_items import read_vqa_items
from llava.errors import LlavaError, amount
from llava.eval.answers.manifest import describe, manifest_of, read_dataset_manifest
from llava.eval.metrics.calibration import Calibration, calibrate
from llava.eval.metrics.joined import JoinedItem, clusters_of, join, metadata_of, read_answers
from llava.eval.metrics.score import Scores, group_keys, score_items
from llava.eval.metrics.strict import reference_polarity
from llava.eval.reports.tables import calibration_line, group_table, score_table
from llava.eval.scoring_flags import RESAMPLES
from llava.manifests import sha256_of
from llava.records import read_json


@dataclass
class Evaluation:
    """Scores of an answer file with everything they rest on."""

    gt: Path
    pred: Path
    joined: list[JoinedItem]
    scores: Scores
    manifest: dict[str, Any] | None
    dataset: dict[str, Any] | None
    settings: dict[str, Any]
    missing: int
    inferred_types: int
    calibration: Calibration | None = None
    changed: dict[str, bool] = field(default_factory=dict)
    """What of "answers" and "questions" has no longer the checksum that the answers' manifest gives."""

    @property
    def asked(self) -> int:
        """How many questions there are, those left out included."""
        return self.scores.questions + (self.missing if self.settings["on_missing"] == "skip" else 0)

    @property
    def remarks(self) -> list[str]:
        """What nobody may overlook who reads the scores: answers that are missing, files that were changed."""
        after = {"answers": "their manifest was written", "questions": "they were answered"}
        found = [f"the {what} were CHANGED after {after[what]}" for what, is_so in self.changed.items() if is_so]
        if self.dataset and self.dataset["changed"]:
            found.append("the questions were CHANGED after they were converted")
        if self.missing:
            fate = "left out" if self.settings["on_missing"] == "skip" else "counted as empty answers"
            found.append(f"missing answers: {self.missing}, {fate}")
        if self.refused:
            found.append(
                f"answers that the server refused to give: {self.refused}, scored by the text that came, if any"
            )
        return found

    @property
    def refused(self) -> int:
        """How many answers the server that was asked declined to give, or broke off (`metadata.refused`)."""
        return sum(bool(metadata_of(entry.record).get("refused")) for entry in self.joined)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the scores, and what made questions and answers."""
        return {
            "gt": str(self.gt),
            "pred": str(self.pred),
            "missing_answers": self.missing,
            "refused_answers": self.refused,
            "inferred_answer_types": self.inferred_types,
            "changed_since_answered": [what for what, is_so in self.changed.items() if is_so],
            "settings": self.settings,
            "produced_by": self.manifest,
            "questions_from": self.dataset,
            **self.scores.as_dict(),
            **({"calibration": self.calibration.as_dict()} if self.calibration else {}),
        }

    def text(self) -> str:
        """For the terminal."""
        scores = self.scores
        lines = [
            f"{self.pred}: {amount(scores.questions, 'question')} ({scores.counts})",
            f"produced by: {describe(self.manifest)}",
        ]
        if self.dataset:
            lines.append(f"questions: {self.dataset['data_set']}, split {self.dataset['split']}")
        lines += self.remarks
        if self.inferred_types:
            untold = amount(self.inferred_types, "record says", "records say")
            lines.append(f"{untold} neither OPEN nor CLOSED: yes/no answers are CLOSED")
        if self.settings["resamples"]:
            lone = f"; a single {self.settings['unit']} gives one of 0 and 100 alone" if scores.lack_interval else ""
            lines.append(f"95 % intervals: {self.settings['resamples']} resamples of {self.settings['unit']}s{lone}")
        lines += ["", score_table(scores)]
        if self.calibration:
            lines += ["", calibration_line(self.calibration)]
        for name, groups in scores.groups.items():
            lines += ["", group_table(name, groups, scores)]
        return "\n".join(lines)


def evaluate(
    gt: str | Path,
    pred: str | Path,
    candidate: str | Path | None = None,
    *,
    on_missing: str = "error",
    script: str = "run_eval_batch",
    group_by: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    unit: str = "question",
    seed: int = 0,
) -> Evaluation:
    """Score the answers of `pred` to the questions of `gt`.

    Args:
        candidate: file of the training split's open answers.
        group_by: record fields to give tables for; None takes those that have few values.
        unit: what the bootstrap draws, "question" or "image".

    Raises:
        LlavaError: fewer than 0 resamples, a seed below 0; files that can't be read or joined; a field of `group_by`
            that no record has.
    """
    if resamples < 0:
        raise LlavaError(f"--bootstrap-samples is {resamples}; give 0 or more")
    if seed < 0:
        raise LlavaError(f"--seed is {seed}; give 0 or more")
    items = read_vqa_items(gt)
    there = dict.fromkeys(name for item in items for name in item.fields)
    if unknown := [name for name in group_by or () if name not in there]:
        raise LlavaError(f"{gt}: no record has {unknown[0]!r} of --group-by; there are: {', '.join(there) or 'none'}")
    joined = join(items, read_answers(pred), gt, pred, on_missing)
    scores = score_items(
        joined,
        None if candidate is None else read_candidates(candidate),
        script=script,
        group_by=group_keys(joined) if group_by is None else group_by,
        clusters=clusters_of(joined, unit),
        resamples=resamples,
        seed=seed,
        progress=lambda entries: tqdm(entries, desc="scoring", unit="answer", leave=False, disable=None),
    )
    answered = sum(bool(entry.record) for entry in joined)
    manifest = manifest_of(pred)
    return Evaluation(
        gt=Path(gt),
        pred=Path(pred),
        joined=joined,
        scores=scores,
        manifest=manifest,
        dataset=read_dataset_manifest(gt),
        settings={
            "on_missing": on_missing,
            "script": script,
            "resamples": resamples,
            "unit": unit,
            "bootstrap_seed": seed,
            "candidate": None if candidate is None else str(candidate),
        },
        missing=len(items) - answered,
        inferred_types=sum(item.type_inferred for item in items),
        calibration=calibration_of(joined),
        changed=changed_since_answered(manifest or {}, gt, pred),
    )


def changed_since_answered(manifest: dict[str, Any], gt: str | Path, pred: str | Path) -> dict[str, bool]:
    """Whether the answers, and the questions where they are the file that was asked, are others than the manifest's."""
    given = {"answers": (pred, manifest.get("sha256"))}
    if manifest.get("questions") and Path(manifest["questions"]).resolve() == Path(gt).resolve():
        given["questions"] = gt, manifest.get("questions_sha256")
    return {
        what: checksum is not None and sha256_of(Path(file)) != checksum for what, (file, checksum) in given.items()
    }


def calibration_of(joined: Sequence[JoinedItem]) -> Calibration | None:
    """Of the closed questions whose reference says yes or no and whose answer carries the probability of yes."""
    chances, truth = [], []
    for entry in joined:
        chance = metadata_of(entry.record).get("p_yes")
        polarity = reference_polarity(entry.item.answer)
        if entry.item.answer_type == "CLOSED" and chance is not None and polarity in {"yes", "no"}:
            chances.append(chance)
            truth.append(polarity == "yes")
    return calibrate(chances, truth)


def read_candidates(path: str | Path) -> list[object]:
    """Open answers of a candidate file: `{"0": [answer, …]}` or the bare list."""
    content = read_json(path)
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, list) or not content:
        raise LlavaError(f'{path}: expected {{"0": [answer, …]}} with at least one answer')
    for number, answer in enumerate(content, 1):
        if answer is None or isinstance(answer, (list, dict)):
            kind = "null" if answer is None else f"a {type(answer).__name__}"
            raise LlavaError(f"{path}: answer {number} is {kind}; expected a text")
    return content
