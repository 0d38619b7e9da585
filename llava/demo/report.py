"""The demo's page: scores, loss curves, examples right and wrong, in one HTML file without outside parts."""

from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from llava.data.phantoms.questions import CHOICE, OPEN, YES_NO
from llava.demo.scores import RUNS, RunScores, table
from llava.manifests import versions
from llava.pages import Card, figure, figures, gallery, note, subheading, what_was_run, write_page
from llava.pages import table as html_table
from llava.pages.charts import Line, bars, curves, smoothed
from llava.records import read_json

PER_KIND = 8
"""Examples shown of right and of wrong answers."""

_LEARNED = {
    "language_model": ("language model", "the language model, from texts"),
    "vision_tower": ("vision tower", "the vision tower, from captions"),
    "stage_1": ("stage 1", "stage 1, the projector"),
    "stage_2": ("stage 2", "stage 2, instructions"),
    "vqa": ("VQA fine-tuning", "fine-tuning on questions"),
}


NO_SCORES = "A small run shows that every step works. Its model has learned next to nothing, so no score is given."


def write_report(
    output: Path, scores: dict[str, RunScores], summary: dict[str, Any], seconds: dict[str, float], claims_scores: bool
) -> Path:
    """Write `output/report.html` and return its path; without scores where they would say nothing."""
    times = [[name.replace("_", " "), f"{value:.0f}"] for name, value in seconds.items()]
    rows = scores[""].rows
    return write_page(
        output / "report.html",
        "From drawn images to answers",
        f"{summary['questions']} questions about findings on images that training never showed, in combinations "
        f"that it never showed. Seed {summary['seed']}, {summary['seconds']:.0f} seconds.",
        [
            ("Scores", _scores(scores) if claims_scores else note(NO_SCORES)),
            ("Loss curves", _curves(output)),
            ("Some answers", gallery([*_examples(output, rows, right=True), *_examples(output, rows, right=False)])),
            ("Time", html_table(["step", "seconds"], times)),
            what_was_run({**read_json(output / "demo.json"), "versions": versions()}),
        ],
    )


def _scores(scores: dict[str, RunScores]) -> Markup:
    drawn = []
    for kind, what in (("closed", "accuracy of closed answers"), ("open", "recall of open answers")):
        numbers = [(RUNS[prefix], run.finding.headline("strict", kind)) for prefix, run in scores.items()]
        shown = bars(what, [(name, number.value, number.low, number.high) for name, number in numbers])
        drawn.append(figure(shown, f"Finding questions, {what} (strict), with 95 % intervals."))
    parts = [_table(table(scores)), note("Brackets hold 95 % bootstrap intervals."), figures(*drawn)]
    parts += [subheading("By family of questions"), _table(_families(scores))]
    parts += [subheading("Modality and organ (not part of the scores above)"), _table(_others(scores))]
    return Markup().join(parts)


def _table(rows: list[list[str]]) -> Markup:
    return html_table(rows[0], rows[1:])


def _families(scores: dict[str, RunScores]) -> list[list[str]]:
    rows = [["family", "questions", *RUNS.values()]]
    for family, group in scores[""].finding.groups["family"].items():
        cells = []
        for run in scores.values():
            own = run.finding.groups["family"][family]
            value = own["strict open"] if own["open"] else own["strict closed"]
            cells.append(f"{value:.1f}")
        rows.append([_in_words(family), str(group["questions"]), *cells])
    return rows


def _others(scores: dict[str, RunScores]) -> list[list[str]]:
    rows = [["run", "closed accuracy", "open recall"]]
    for prefix, run in scores.items():
        numbers = [run.other.headline("strict", kind).value for kind in ("closed", "open")]
        rows.append([RUNS[prefix], *("-" if number is None else f"{number:.1f}" for number in numbers)])
    return rows


def _curves(output: Path) -> Markup:
    """Loss of the base models and of each stage, with images and blind."""
    drawn = []
    for name, (title, words) in _LEARNED.items():
        found = [(RUNS[prefix].partition(":")[0], _losses(output / f"{prefix}{name}")) for prefix in ("", "blind_")]
        lines = [Line(label, range(1, len(losses) + 1), smoothed(losses)) for label, losses in found if losses]
        if lines:
            shown = curves(title, lines, "step", "loss")
            drawn.append(figure(shown, f"Smoothed training loss of {words}."))
    return figures(*drawn) if drawn else Markup()


def _losses(folder: Path) -> list[float]:
    if (folder / "losses.json").is_file():
        return read_json(folder / "losses.json")
    if (folder / "trainer_state.json").is_file():
        return [log["loss"] for log in read_json(folder / "trainer_state.json")["log_history"] if "loss" in log]
    return []


def _examples(output: Path, rows: list[dict[str, Any]], *, right: bool) -> list[Card]:
    """Some answers, an image once and the families in turn."""
    chosen, images, families = [], set(), set()
    for row in sorted(rows, key=lambda row: row["image"][::-1]):
        if row["right"] == right and row["image"] not in images and row["family"] not in families:
            chosen.append(row)
            images.add(row["image"])
            families.add(row["family"])
    return [_card(output, row) for row in chosen[:PER_KIND]]


def _card(output: Path, row: dict[str, Any]) -> Card:
    with Image.open(output / "data" / "images" / row["image"]) as image:
        image.load()
    right = row["right"]
    return Card(image, row["question"], str(row["reference"]), row["prediction"], right, _in_words(row["family"]))


def _in_words(family: str) -> str:
    """ "kind_yes_no" → "kind (yes/no)"."""
    for form, words in ((YES_NO, "yes/no"), (CHOICE, "choice"), (OPEN, "open")):
        if family.endswith(f"_{form}"):
            return f"{family.removesuffix(f'_{form}').replace('_', ' ')} ({words})"
    return family.replace("_", " ")
