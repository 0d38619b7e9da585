"""Questions to an answer file: resumable after a kill, with a manifest of what made it.

`answer_questions` lets this machine's engine (local_answers) or a remote server (remote_answers) fill the file
with what is missing, and puts it under its name when every question has an answer.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava.eval.answers.manifest import read_dataset_manifest
from llava.eval.answers.questions import Question
from llava.manifests import claim, fingerprint_of, finished, refuse_another, sha256_of, write_manifest
from llava.records import Record
from llava.resumable import ResumableJsonl

log = logging.getLogger(__name__)


_OF_A_PART = {"chunk", "asked"}
"""The settings in which parts of one run differ."""
_WHOLE = [0, 1]
"""The setting `chunk` of a run in one part."""

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
        LlavaError: the file, finished or not, is of other settings, or whatever `fill` raises.
    """
    answers_file = Path(answers_file)
    fingerprint = fingerprint_of(settings)
    of_the_run = {key: settings[key] for key in settings.keys() - _OF_A_PART}
    run = fingerprint_of(of_the_run)
    is_part = whole is not None or settings.get("chunk", _WHOLE) != _WHOLE
    if not overwrite:
        found = None if is_part else _finished_whole(answers_file, run)
        found = found or finished(answers_file, "fingerprint", fingerprint)
        if whole is not None and not found:
            found = _finished_whole(whole, run)
            if not found:
                refuse_another(whole, of_the_run)
        if found:
            log.info("%s is complete already; --overwrite answers again", whole or answers_file)
            return found
    claim(answers_file, settings, overwrite=overwrite)
    started = time.monotonic()
    with ResumableJsonl(answers_file) as output:
        resumed = len(output.done)
        missing = any(question.id not in output.done for question in questions)
        about = fill(questions, output) if missing else {}
        records = list(output.done.values())
        output.finish((question.id for question in questions), keep_part=True)
    about = about or _kept_about(records)
    return write_manifest(
        answers_file,
        **(settings | {"run": run} | about),
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


def _finished_whole(path: Path, run: str) -> dict[str, Any] | None:
    """The manifest of all answers of a run, in how many parts ever they were made."""
    manifest = finished(path, "run", run)
    return manifest if manifest and manifest.get("chunk", _WHOLE) == _WHOLE else None
