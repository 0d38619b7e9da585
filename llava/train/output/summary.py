"""The end of a run: `training_summary.json`, a page with curves and answers, and an image of the loss."""

import platform
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llava.errors import amount
from llava.pages.charts import Line, smoothed, style
from llava.records import atomic_path, read_json, read_records, write_json
from llava.train.validation.flags import ANSWERS

SUMMARY = "training_summary.json"
CURVE = "loss_curve.png"
PAGE = "training_report.html"
_SMOOTHED_FROM = 20
_STEPS_SHOWN = 4
_QUESTIONS_SHOWN = 8
_CURVES = (
    ("learning_rate", "Learning rate", "rate", "Learning rate."),
    ("tokens_per_second", "Speed", "tokens/s", "Real tokens per second, of all processes, since the start."),
    ("mfu", "MFU", "share", "Share of the device's peak that the model's own products reach, since the start."),
    (
        "data_wait",
        "Waiting for data",
        "share",
        "Share of the training time spent waiting for batches.",
    ),
)
_CUT = {
    "truncated": "cut at the length limit",
    "without_target": "without a target that is left",
    "answers_without_question": "with answers that no question precedes",
    "left_out": "left out, as they can't be read",
}


def add_losses(summary: dict[str, Any], log_history: list[dict]) -> dict[str, Any]:
    """The summary with what the Trainer's logs (`step`, `loss`, `learning_rate`, …) tell, and what ran."""
    losses = [log["loss"] for log in log_history if "loss" in log]
    tail = losses[-max(1, len(losses) // 10) :]
    held_out = [log for log in log_history if "eval_loss" in log]
    best = min(held_out, key=lambda log: log["eval_loss"], default=None)
    if best is not None:
        measured = {
            "evaluations": len(held_out),
            "first_loss": held_out[0]["eval_loss"],
            "last_loss": held_out[-1]["eval_loss"],
            "lowest_loss": best["eval_loss"],
            "lowest_loss_step": best["step"],
            "curve": [_measured(log) for log in held_out],
        }
        summary = {**summary, "validation": {**(summary.get("validation") or {}), **measured}}
    return {
        **summary,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "mean_loss_of_last_tenth": sum(tail) / len(tail) if tail else None,
        "versions": versions(),
    }


def write_summary(output_dir: str | Path, summary: dict[str, Any], log_history: list[dict]) -> None:
    """Write `training_summary.json`, the page and the image, the last two where anything was logged."""
    folder = Path(output_dir)
    write_json(folder / SUMMARY, summary)
    if any("loss" in log for log in log_history):
        _draw(folder / CURVE, log_history)
        _write_page(folder, summary, log_history)


def finished_before(output_dir: str | Path, steps: int) -> dict[str, Any]:
    """The summary of a whole run of so many optimizer steps that the folder holds; empty if there is none."""
    folder = Path(output_dir)
    if not ((folder / SUMMARY).is_file() and (folder / "config.json").is_file()):
        return {}
    summary: dict[str, Any] = read_json(folder / SUMMARY)
    return summary if summary.get("steps") == steps else {}


def versions() -> dict[str, str]:
    """What ran: Python, torch, transformers, the machine."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }


def _measured(log: dict) -> dict[str, float]:
    """The step of an evaluation and its numbers, without "eval_"."""
    found = {name.removeprefix("eval_"): value for name, value in log.items() if name.startswith("eval_")}
    return {"step": log["step"], **{name: value for name, value in found.items() if name != "runtime"}}


def _draw(path: Path, log_history: list[dict]) -> None:
    from matplotlib.figure import Figure

    with style(), atomic_path(path) as temporary:
        figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        for line in _losses(log_history):
            axes.plot(line.x, line.y, label=line.label, linewidth=1 if line.is_soft else 2)
        axes.set(xlabel="optimizer step", ylabel="loss")
        axes.legend()
        figure.savefig(temporary, format="png")


def _write_page(folder: Path, summary: dict[str, Any], log_history: list[dict]) -> None:
    from llava.pages import figure, figures, table, what_was_run, write_page
    from llava.pages.charts import curves

    drawn = [
        figure(curves(title, lines, "optimizer step", unit), caption)
        for title, unit, caption, lines in (
            (
                "Loss",
                "loss",
                "Loss of the training records, and of the held-out ones if there are any.",
                _losses(log_history),
            ),
            *((what, unit, caption, _logged(log_history, what, name)) for name, what, unit, caption in _CURVES),
        )
        if lines
    ]
    facts = [[label, said] for label, said in _facts(summary) if said is not None]
    resumed = summary.get("resumed_from")
    since = f" (with the records and tokens seen: since {Path(resumed).name}, where it was resumed)" if resumed else ""
    run = {name: summary.get(name) for name in ("output_dir", "resumed_from", "conversation_template", "versions")}
    write_page(
        folder / PAGE,
        f"Training: {folder.resolve().name}",
        f"{amount(summary['steps'], 'optimizer step')} over {amount(summary['samples'], 'record')}, "
        f"{summary['seconds']:,.0f} seconds{since}.",
        [
            ("Result", table(["", ""], facts)),
            ("Over the run", figures(*drawn)),
            ("Held-out records", _evaluations(summary.get("validation"))),
            ("Answers to held-out questions", _answers(folder)),
            ("Cut or left out", _left_out(summary)),
            what_was_run(run),
        ],
    )


def _losses(log_history: list[dict]) -> list[Line]:
    lines = _logged(log_history, "training", "loss")
    if lines and len(lines[0].y) >= _SMOOTHED_FROM:
        (loss,) = lines
        lines = [loss._replace(is_soft=True), loss._replace(label="training, smoothed", y=smoothed(loss.y))]
    return lines + _logged(log_history, "held-out", "eval_loss")


def _logged(log_history: list[dict], label: str, name: str) -> list[Line]:
    """The values of `name`, as a line of one; none where it was never logged."""
    logs = [log for log in log_history if name in log]
    return [Line(label, [log["step"] for log in logs], [log[name] for log in logs])] if logs else []


def _facts(summary: dict[str, Any]) -> list[tuple[str, str | None]]:
    def number(name: str, form: str = ",") -> str | None:
        value = summary.get(name)
        return None if value is None else format(value, form)

    return [
        ("loss of the first step", number("first_loss", ".4f")),
        ("loss of the last step", number("last_loss", ".4f")),
        ("mean loss of the last tenth", number("mean_loss_of_last_tenth", ".4f")),
        ("epochs", number("epochs", ".2f")),
        ("records seen", number("samples_seen")),
        ("tokens seen", number("tokens_seen")),
        ("tokens per second", number("tokens_per_second")),
        ("share of the device's peak (MFU)", number("mfu", ".1%")),
        ("share of the time spent waiting for data", number("data_wait", ".1%")),
        ("most memory", f"{number('peak_memory_mb', ',.0f')} MB"),
        ("parameters, of which trained", f"{number('parameters')}, {number('trainable_parameters')}"),
        ("processes, records per step", f"{number('processes')}, {number('samples_per_step')}"),
    ]


def _evaluations(validation: dict[str, Any] | None) -> Markup:
    from llava.pages import note, table

    curve = (validation or {}).get("curve") or []
    if validation is None or not curve:
        return Markup()
    names = list(dict.fromkeys(name for measured in curve for name in measured))
    rows = [["" if (value := one.get(name)) is None else f"{value:g}" for name in names] for one in curve]
    best = "" if validation.get("best_step") is None else f" The best one was that of step {validation['best_step']:,}."
    return table([name.replace("_", " ") for name in names], rows) + note(
        f"{amount(validation['samples'], 'record')} of {validation['data_path']}.{best}"
    )


def _answers(folder: Path) -> Markup:
    """The first questions with their answers at the first evaluation, the last, and some between."""
    from llava.pages import note, table

    files = {int(path.stem.removeprefix("step-")): path for path in (folder / ANSWERS).glob("step-*.jsonl")}
    steps = sorted(files)
    if not steps:
        return Markup()
    shown = sorted({steps[round(place)] for place in _spread(len(steps), _STEPS_SHOWN)})
    answers = [{row["question_id"]: row for row in read_records(files[step])} for step in shown]
    rows = [
        [row["question"], row["reference"], *(found.get(name, {}).get("text", "") for found in answers)]
        for name, row in list(answers[-1].items())[:_QUESTIONS_SHOWN]
    ]
    header = ["question", "reference", *(f"step {step:,}" for step in shown)]
    said = (
        f"{len(rows)} of {len(answers[-1])} questions, {len(shown)} of {len(steps)} evaluations; all are in {ANSWERS}/."
    )
    return table(header, rows) + note(said)


def _left_out(summary: dict[str, Any]) -> Markup:
    from llava.pages import note, table

    parts = [("training", summary), ("held-out", summary.get("validation") or {})]
    rows = [
        [f"{which} records {words}", f"{found['count']:,}", ", ".join(map(str, found["first"]))]
        for which, part in parts
        for name, words in _CUT.items()
        if (found := part.get(name)) and found["count"]
    ]
    return table(["", "count", "the first of them"], rows) if rows else note("Nothing.")


def _spread(count: int, most: int) -> list[float]:
    """At most `most` places from 0 to `count` - 1, both ends in, evenly."""
    if count <= most:
        return [float(place) for place in range(count)]
    return [place * (count - 1) / (most - 1) for place in range(most)]
