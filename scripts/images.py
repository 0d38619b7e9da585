"""Draw images/: the logo and the pipeline, as SVG without a date, so that the same drawing is the same file.

python scripts/images.py [FOLDER]
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from llava.pages.charts import COLORS, INK, PAPER, style

FOLDER = Path(__file__).resolve().parents[1] / "images"
STEPS = (
    ("llava.data", "images, VQA sets,\ncaptions, DICOM\n→ records"),
    ("llava.train", "records\n→ checkpoint"),
    ("llava.generation", "conversation, images\n→ answer"),
)
ENDS = (("llava.eval", "answers → metrics → report"), ("llava.serve", "worker → controller → API, page"))


def logo(axes: Any) -> None:
    """A speech bubble that holds a scan's circle and its cross hairs."""
    axes.set(xlim=(0, 5.4), ylim=(0, 2))
    axes.add_patch(FancyBboxPatch((0.25, 0.45), 1.3, 1.3, boxstyle="round,pad=0.1,rounding_size=0.3", color=COLORS[0]))
    axes.fill([0.35, 0.75, 0.3], [0.5, 0.4, 0.1], color=COLORS[0])
    axes.add_patch(Circle((0.9, 1.1), 0.5, fill=False, color=PAPER, linewidth=4))
    axes.plot([0.9, 0.9], [0.45, 1.75], color=PAPER, linewidth=2)
    axes.plot([0.25, 1.55], [1.1, 1.1], color=PAPER, linewidth=2)
    axes.add_patch(Circle((1.12, 1.3), 0.12, color=PAPER))
    axes.text(1.95, 1.1, "LLaVA-Med", fontsize=34, fontweight="bold", va="center", color=INK)


def pipeline(axes: Any) -> None:
    """How data flows, package by package."""
    axes.set(xlim=(0, 16), ylim=(0, 4))
    for place, (name, words) in enumerate(STEPS):
        box(axes, 0.2 + 3.9 * place, 1.2, 3.1, 1.6, name, words, COLORS[0])
        ends = [2.0] if place < len(STEPS) - 1 else [3.1, 0.9]
        for end in ends:
            start = (3.4 + 3.9 * place, 2.0)
            arrow = FancyArrowPatch(start, (start[0] + 0.6, end), arrowstyle="-|>", mutation_scale=14, color=INK)
            axes.add_patch(arrow)
    for height, (name, words) in zip((2.4, 0.2), ENDS):
        box(axes, 11.9, height, 3.9, 1.4, name, words, COLORS[1])


def box(axes: Any, x: float, y: float, width: float, height: float, name: str, words: str, color: str) -> None:
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05", facecolor="white", edgecolor=color)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height - 0.3, name, ha="center", va="center", fontweight="bold", color=color)
    axes.text(x + width / 2, y + (height - 0.5) / 2, words, ha="center", va="center", fontsize=9.5, color=INK)


DRAWN: dict[str, tuple[Callable[[Any], None], tuple[float, float], str]] = {
    "logo.svg": (logo, (5.4, 2.0), "LLaVA-Med"),
    "pipeline.svg": (pipeline, (12.0, 3.0), "Data, training, generation, then evaluation and serving"),
}


def draw(name: str) -> str:
    """The SVG of an image, its `title` for screen readers included."""
    import io

    function, size, title = DRAWN[name]
    with style():
        figure = Figure(figsize=size)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        function(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title, "Creator": None})
    return re.sub(r"[ \t]+\n", "\n", buffer.getvalue())


def main(argv: list[str]) -> None:
    folder = Path(argv[0]) if argv else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in DRAWN:
        (folder / name).write_text(draw(name), encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main(sys.argv[1:])
