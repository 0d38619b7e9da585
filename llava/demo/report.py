"""The demo's page: scores, loss curves, examples right and wrong, in one HTML file without outside parts."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from llava.constants import RESEARCH_NOTICE
from llava.demo.scores import RUNS, RunScores, table
from llava.records import atomic_path, read_json

PER_KIND = 8
"""Examples shown of right and of wrong answers."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .3em .8em; border-bottom: 1px solid #ddd; }
th { text-align: left; } .notice { background: #fff3cd; padding: .6em 1em; border-radius: 4px; }
.examples { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1em; }
figure { margin: 0; } figure img { width: 100%; image-rendering: auto; border-radius: 4px; }
figcaption { font-size: 13px; } .right { color: #18753c; } .wrong { color: #b3261e; } svg, img.plot { max-width: 100%; }
"""


def write_report(
    output: Path, scores: dict[str, RunScores], summary: dict[str, Any], seconds: dict[str, float]
) -> Path:
    """Write `output/report.html` and return its path."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Demo</title>",
        f"<style>{_STYLE}</style><h1>From drawn images to answers</h1>",
        f'<p class="notice">{html.escape(RESEARCH_NOTICE)}</p>',
        f"<p>{summary['questions']} questions about findings on images that training never showed, in combinations "
        f"that it never showed. Seed {summary['seed']}, {summary['seconds']:.0f} seconds. Brackets hold 95 % "
        "bootstrap intervals.</p>",
        "<h2>Scores</h2>",
        _table(table(scores)),
        "<h3>By family of questions</h3>",
        _table(_families(scores)),
        "<h3>Modality and organ (not part of the scores above)</h3>",
        _table(_others(scores)),
        "<h2>Loss curves</h2>",
        _curves(output),
        "<h2>Examples</h2><h3>Right</h3>",
        _examples(output, scores[""].rows, right=True),
        "<h3>Wrong</h3>",
        _examples(output, scores[""].rows, right=False),
        "<h2>Time</h2>",
        _table([["step", "seconds"]] + [[name.replace("_", " "), f"{value:.0f}"] for name, value in seconds.items()]),
        "</html>",
    ]
    path = output / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return path


def _table(rows: list[list[str]]) -> str:
    cells = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th"] + ["td"] * len(rows), rows)
    ]
    return f"<table>{''.join(cells)}</table>"


def _families(scores: dict[str, RunScores]) -> list[list[str]]:
    rows = [["family", "questions", *RUNS.values()]]
    for family, group in scores[""].finding.groups["family"].items():
        cells = []
        for run in scores.values():
            own = run.finding.groups["family"][family]
            value = own["strict open"] if own["open"] else own["strict closed"]
            cells.append(f"{value:.1f}")
        rows.append([family.replace("_", " "), str(group["questions"]), *cells])
    return rows


def _others(scores: dict[str, RunScores]) -> list[list[str]]:
    rows = [["run", "closed accuracy", "open recall"]]
    for prefix, run in scores.items():
        numbers = [run.other.headline("strict", kind).value for kind in ("closed", "open")]
        rows.append([RUNS[prefix], *("-" if number is None else f"{number:.1f}" for number in numbers)])
    return rows


def _curves(output: Path) -> str:
    """Loss of the base models and of each stage, with images and blind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(2, 3).flat)
    for axes, name in zip(panels, ("language_model", "vision_tower", "stage_1", "stage_2", "vqa")):
        for prefix, color in (("", "#08519c"), ("blind_", "#999999")):
            losses = _losses(output / f"{prefix}{name}")
            if losses:
                axes.plot(_smooth(losses), color=color, label=RUNS[prefix].partition(":")[0])
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    for axes in panels[5:]:
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f'<img class="plot" alt="loss curves" src="{_data_url(buffer.getvalue())}">'


def _losses(folder: Path) -> list[float]:
    if (folder / "losses.json").is_file():
        return read_json(folder / "losses.json")
    if (folder / "trainer_state.json").is_file():
        return [log["loss"] for log in read_json(folder / "trainer_state.json")["log_history"] if "loss" in log]
    return []


def _smooth(values: list[float]) -> list[float]:
    weight, mean, out = min(1.0, 20 / len(values)), values[0], []
    for value in values:
        mean += weight * (value - mean)
        out.append(mean)
    return out


def _examples(output: Path, rows: list[dict[str, Any]], *, right: bool) -> str:
    """Some answers, an image once and the families in turn."""
    chosen, images, families = [], set(), set()
    for row in sorted(rows, key=lambda row: row["image"][::-1]):
        if row["right"] == right and row["image"] not in images and row["family"] not in families:
            chosen.append(row)
            images.add(row["image"])
            families.add(row["family"])
    if not chosen:
        return "<p>none</p>"
    return f'<div class="examples">{"".join(_figure(output, row) for row in chosen[:PER_KIND])}</div>'


def _figure(output: Path, row: dict[str, Any]) -> str:
    image = _data_url((output / "data" / "images" / row["image"]).read_bytes())
    mark = "right" if row["right"] else "wrong"
    return (
        f'<figure><img alt="{html.escape(row["image"])}" src="{image}"><figcaption>{html.escape(row["question"])}'
        f"<br>truth: <b>{html.escape(str(row['reference']))}</b>"
        f'<br>answer: <b class="{mark}">{html.escape(row["prediction"])}</b></figcaption></figure>'
    )


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
