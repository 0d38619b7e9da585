"""Flags of validation: held-out records, what is measured on them, and when that ends a run."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from llava.errors import LlavaError
from llava.folders import expanded

ANSWER_METRICS = {"strict_open": "OPEN", "strict_closed": "CLOSED"}
"""What `--eval_generate` adds to the held-out loss, and the kind of question that counts."""

ANSWERS = "eval_answers"
"""The folder inside the output folder that holds their answers, a file per evaluation."""


def _flag(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class ValidationArguments:
    """Held-out records."""

    _argument_group_name: ClassVar[str] = "held-out records"

    eval_data_path: str | None = _flag(None, "held-out records, whose loss is measured as --eval_strategy says")
    eval_image_folder: str | None = _flag(None, "folder of their images (default: --image_folder)")
    eval_generate: int = _flag(
        0, "answer so many of their questions at each evaluation too, and score the answers (strict metrics)"
    )
    eval_max_new_tokens: int = _flag(64, "longest such answer, in tokens")
    early_stopping_patience: int | None = _flag(
        None, "end the run after so many evaluations without a better --metric_for_best_model (default: loss)"
    )


def check_validation(validation: ValidationArguments, training: Any) -> None:
    """Refuse what can't be, before anything is loaded (`training`: the Trainer's flags)."""
    evaluates = str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no"
    if validation.eval_data_path:
        for flag in ("eval_data_path", "eval_image_folder"):
            path = getattr(validation, flag)
            if path and not expanded(path).exists():
                raise LlavaError(f"--{flag} {path}: no such file or folder")
        if not evaluates:
            raise LlavaError("--eval_data_path: say when it is measured, with --eval_strategy epoch or steps")
    else:
        _refuse_without_records(validation, training, evaluates)
    if training.per_device_eval_batch_size < 1:
        raise LlavaError(f"--per_device_eval_batch_size {training.per_device_eval_batch_size}: expected at least 1")
    for flag, least in (("eval_generate", 0), ("eval_max_new_tokens", 1), ("early_stopping_patience", 1)):
        value = getattr(validation, flag)
        if value is not None and value < least:
            raise LlavaError(f"--{flag} {value}: expected at least {least}")
    if validation.early_stopping_patience is not None and training.metric_for_best_model is None:
        training.metric_for_best_model, training.greater_is_better = "loss", False
    _check_metric(validation, training)


def metric_name(training: Any) -> str:
    """`--metric_for_best_model` as it stands in the logs."""
    return "eval_" + training.metric_for_best_model.removeprefix("eval_")


def _refuse_without_records(validation: ValidationArguments, training: Any, evaluates: bool) -> None:
    needing = {
        f"eval_strategy {getattr(training.eval_strategy, 'value', training.eval_strategy)}": evaluates,
        "eval_on_start": training.eval_on_start,
        "load_best_model_at_end": training.load_best_model_at_end,
        "save_strategy best": str(getattr(training.save_strategy, "value", training.save_strategy)) == "best",
        "eval_generate": validation.eval_generate,
        "eval_image_folder": validation.eval_image_folder,
        "early_stopping_patience": validation.early_stopping_patience,
    }
    for flag, is_asked in needing.items():
        if is_asked:
            raise LlavaError(f"--{flag} needs held-out records; add --eval_data_path")


def _check_metric(validation: ValidationArguments, training: Any) -> None:
    if not validation.eval_data_path or training.metric_for_best_model is None:
        return
    known = ["loss", *(ANSWER_METRICS if validation.eval_generate else ())]
    if metric_name(training).removeprefix("eval_") not in known:
        more = "" if validation.eval_generate else f"; with --eval_generate also {', '.join(ANSWER_METRICS)}"
        raise LlavaError(
            f"--metric_for_best_model {training.metric_for_best_model}: expected {' or '.join(known)}{more}"
        )
