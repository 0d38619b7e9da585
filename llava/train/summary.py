"""The end of a run on one page: `training_summary.json` and an image of the loss curve."""

import platform
from pathlib import Path
from typing import Any

from llava.records import atomic_path, write_json

SUMMARY = "training_summary.json"
CURVE = "loss_curve.png"


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
    """Write both files."""
    write_json(Path(output_dir) / SUMMARY, summary)
    logs = [log for log in log_history if "loss" in log]
    if logs:
        _draw(Path(output_dir) / CURVE, logs, [log for log in log_history if "eval_loss" in log])


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


def _draw(path: Path, logs: list[dict], held_out: list[dict]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = [log["step"] for log in logs], [log["loss"] for log in logs]
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="loss")
    if len(losses) >= 20:
        axes.plot(steps, _smooth(losses), color="#08519c", linewidth=2, label="smoothed")
    if held_out:
        places, values = [log["step"] for log in held_out], [log["eval_loss"] for log in held_out]
        axes.plot(places, values, color="#d94801", linewidth=2, marker="o", markersize=4, label="held-out")
    axes.set(xlabel="optimizer step", ylabel="loss (token mean)")
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(steps, [log.get("learning_rate", 0) for log in logs], color="#bbbbbb", linestyle=":", linewidth=1)
    rates.set_ylabel("learning rate (dotted)")
    axes.legend(loc="upper right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run."""
    weight = min(1.0, 20 / len(values))
    out, mean = [], values[0]
    for value in values:
        mean += weight * (value - mean)
        out.append(mean)
    return out
