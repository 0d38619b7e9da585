"""Questions to an answer file: resumable after a kill, with a manifest of what made it.

`answer_questions` lets this machine's engine (local_answers) or a remote server (remote_answers) fill the file
with what is missing, and puts it under its name when every question has an answer.
"""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava.data.conversion import sha256_of
from llava.errors import LlavaError
from llava.eval.answers.manifest import manifest_path, read_dataset_manifest, read_manifest, write_manifest
from llava.eval.answers.questions import Question
from llava.folders import PART
from llava.records import Record, ResumableJsonl, read_json, write_json

log = logging.getLogger(__name__)


_OF_A_PART = {"chunk", "asked"}
"""The settings in which parts of one run differ."""

Fill = Callable[[Sequence[Question], ResumableJsonl], dict[str, Any]]
"""Answers what the file doesn't hold yet; returns what the manifest is to say about who answered."""


def answer_questions(
    questions: Sequence[Question],
    answers_file: str | Path,
    settings: dict[str, Any],
    fill: Fill,
    *,
    overwrite: bool = False,
    whole: Path | None = None,
) -> dict[str, Any]:
    """Answer every question into `answers_file` (JSONL, in the order of the questions); returns the manifest.

    Args:
        settings: all that decides the answers (questions, checkpoint, decoding, …), JSON-ready. A run that was
            killed goes on only under the same settings; a finished file of the same settings stays as it is.
        fill: answers what is missing; called only if something is.
        overwrite: start anew, whatever is there.
        whole: the file that this one is a part of; where it is complete, the part isn't answered again.

    Raises:
        LlavaError: the unfinished file belongs to other settings, or whatever `fill` raises.
    """
    answers_file = Path(answers_file)
    fingerprint = _fingerprint(settings)
    if whole is not None:
        settings = settings | {"run": _fingerprint({key: settings[key] for key in settings.keys() - _OF_A_PART})}
    if not overwrite:
        for path, mark, value in ((answers_file, "fingerprint", fingerprint), (whole, "run", settings.get("run"))):
            if path is not None and (finished := _finished(path, mark, value)):
                log.info("%s is complete already; --overwrite answers again", path)
                return finished
    _claim(answers_file, settings, fingerprint, overwrite)
    started = time.monotonic()
    with ResumableJsonl(answers_file) as output:
        resumed = len(output.done)
        missing = any(question.id not in output.done for question in questions)
        about = fill(questions, output) if missing else {}
        records = list(output.done.values())
        output.finish(question.id for question in questions)
    _claim_path(answers_file).unlink(missing_ok=True)
    about = about or _kept_about(records)
    return write_manifest(
        answers_file,
        **(settings | about),
        fingerprint=fingerprint,
        counts={
            "questions": len(questions),
            "images": len({str(image) for question in questions for image in question.images}),
            "resumed": resumed,
            "cut_at_max_new_tokens": sum(r["metadata"].get("finish_reason") == "length" for r in records),
        },
        seconds=round(time.monotonic() - started, 1),
    )


def answer_record(question: Question, text: str, model_id: str, metadata: dict[str, Any]) -> Record:
    """The line of an answer file."""
    # Derived, not random: a run that was killed and one that wasn't write the same file.
    answer_id = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([question.id, question.text, text, model_id]))
    return {
        "question_id": question.id,
        "prompt": question.plain,
        "text": text,
        "answer_id": str(answer_id),
        "model_id": model_id,
        "metadata": metadata,
    }


def question_settings(question_file: str | Path, questions: Sequence[Question], **more: Any) -> dict[str, Any]:
    """The settings that say which questions are asked: file, checksum and what the converter wrote about it."""
    return {
        "questions": str(question_file),
        "questions_sha256": sha256_of(Path(question_file)),
        "dataset": read_dataset_manifest(question_file),
        "asked": len(questions),
        **more,
    }


def _kept_about(records: Sequence[Record]) -> dict[str, Any]:
    """All answers were there, only the renaming was missing: the model needn't be loaded to say its name."""
    return {"model_id": records[0]["model_id"]} if records else {}


def _fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _finished(answers_file: Path, mark: str, value: str | None) -> dict[str, Any] | None:
    """The manifest of a file that is complete and whose `mark` has this value."""
    manifest = read_manifest(answers_file) if answers_file.is_file() else None
    if manifest is None or manifest.get(mark) != value:
        return None
    return manifest if manifest.get("sha256") == sha256_of(answers_file) else None


def _claim_path(answers_file: Path) -> Path:
    return answers_file.with_name(f"{answers_file.name}{PART}.json")


def _claim(answers_file: Path, settings: dict[str, Any], fingerprint: str, overwrite: bool) -> None:
    """Note whose answers the unfinished file holds, or make sure that they are ours."""
    part, claim = answers_file.with_name(f"{answers_file.name}{PART}"), _claim_path(answers_file)
    if overwrite:
        part.unlink(missing_ok=True)
    elif part.is_file() and part.stat().st_size:
        kept = read_json(claim) if claim.is_file() else {}
        if kept.get("fingerprint") != fingerprint:
            other = {key for key, value in settings.items() if kept.get("settings", {}).get(key) != _as_json(value)}
            differs = ", ".join(sorted(other)) or "all"
            raise LlavaError(
                f"{part} holds answers of another run (different: {differs}); "
                f"finish that one, or start anew with --overwrite"
            )
    # The old answers and their manifest stay until the new ones are complete; a manifest never outlives its file.
    answers_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(claim, {"fingerprint": fingerprint, "settings": settings})
    if answers_file.is_file():
        manifest_path(answers_file).unlink(missing_ok=True)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
