"""Charts for pages: drawn by matplotlib, written as SVG that takes its colours of ink and lines from the page.

Sizes are CSS pixels. Text stays text, so that it is found and read aloud.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#3a7fb5", "#d07a3a", "#4f9a68", "#8f6fb8", "#c05a78", "#7d8893")
"""Of series: readable on white and on dark ground."""
WIDTH = 460
INK, SOFT, LINE, PAPER = "#1d2733", "#5c6875", "#d5dce3", "#ffffff"
"""As in templates/theme.css; in a page they become its variables, so that they follow the reader's colour scheme."""

MOST_POINTS = 1000
"""Of a line."""
_FEW_POINTS = 30
"""A line of so few gets marks."""
_VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", PAPER: "--paper"}
_ROW = 38
"""Pixels of a bar with its label above it."""


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for everything that is drawn here."""
    from matplotlib import rc_context

    settings: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # of names with $ in them
        "svg.hashsalt": "llava",
        "font.family": "sans-serif",
        "font.size": 12,
        "axes.titlesize": 13,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.edgecolor": LINE,
        "axes.labelcolor": SOFT,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": LINE,
        "text.color": INK,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": SOFT,
        "ytick.labelcolor": SOFT,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "legend.frameon": False,
    }
    with rc_context(settings):
        yield


def chart(draw: "Callable[[Axes], None]", label: str, height: float, width: float = WIDTH) -> Markup:
    """What `draw` draws into axes of `width` × `height` pixels, as SVG; `label` is what a screen reader says."""
    from matplotlib.figure import Figure

    with style():
        # One point of SVG is shown as one pixel.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Inside HTML the names of the formats aren't needed, nor those of groups, which would occur in every figure.
    text = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def bars(title: str, rows: Sequence[tuple[str, float | None, float | None, float | None]], unit: str = "%") -> Markup:
    """Horizontal bars from 0 to 100: (label, value, low, high) each, with its interval if it has one.

    Rows without a value say so. The colour goes by the row's place.
    """

    def draw(axes: "Axes") -> None:
        for place, (label, value, low, high) in enumerate(rows):
            axes.text(0, place - 0.36, _short(label, 56), va="center", fontsize=12)
            end = value or 0.0
            axes.barh(place, end, height=0.42, color=COLORS[place % len(COLORS)])
            if value is not None and low is not None and high is not None:
                axes.plot([low, high], [place, place], color=INK, linewidth=1.3, marker="|", markersize=8)
                end = max(end, high)
            shown = "no question" if value is None else f"{value:.1f}"
            axes.text(end + 1.5, place, shown, va="center", fontsize=12, fontweight="bold")
        axes.set(title=title, xlabel=unit, xlim=(0, 112), ylim=(len(rows) - 0.6, -0.75), yticks=[])
        axes.set_xticks(range(0, 101, 20))
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_color(LINE)

    values = ", ".join(f"{label} {'none' if value is None else f'{value:.1f}'}" for label, value, *_ in rows)
    return chart(draw, f"Bars, {title}, in {unit}: {values}", 78 + _ROW * len(rows))


def reliability(title: str, bins: Sequence[Any]) -> Markup:
    """Share of right answers over confidence (fractions in `bins`), with the number of answers at each point."""

    def draw(axes: "Axes") -> None:
        most = max((one.count for one in bins), default=1)
        axes.plot([0, 100], [0, 100], color=SOFT, linestyle="--", linewidth=1)
        for one in bins:
            x, y = 100 * one.confidence, 100 * one.accuracy
            axes.scatter(x, y, s=240 + 260 * one.count / most, color=COLORS[0], alpha=0.7, linewidths=0)
            axes.annotate(str(one.count), (x, y), ha="center", va="center", fontsize=10)
        axes.set(title=title, xlabel="confidence (%)", ylabel="right answers (%)", xlim=(-4, 104), ylim=(-6, 106))
        axes.set_box_aspect(1)

    points = ", ".join(f"{100 * one.accuracy:.0f} at {100 * one.confidence:.0f}" for one in bins)
    return chart(draw, f"Right answers over confidence, {title}, in percent: {points}", 400, 400)


class Line(NamedTuple):
    """Values over steps; `is_soft`: drawn thin, behind what is made of it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    is_soft: bool = False


def curves(title: str, lines: Sequence[Line], x: str, y: str) -> Markup:
    """Lines of values; a legend where there are several. Of long lines so many points are drawn as can be seen."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for place, line in enumerate(lines):
            every = -(-len(line.x) // MOST_POINTS)
            look: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.45} if line.is_soft else {"linewidth": 1.8}
            if len(line.x) <= _FEW_POINTS and not line.is_soft:
                look["marker"] = "o"
            color = COLORS[place % len(COLORS)]
            axes.plot(line.x[::every], line.y[::every], color=color, label=line.label, **look)
        axes.set(title=title, xlabel=x, ylabel=y)
        if len(lines) > 1:
            axes.legend()

    ends = ", ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines if line.y)
    return chart(draw, f"{y} over {x}, {title}: {ends}", 250, 400)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of them."""
    weight, mean, out = min(1.0, 20 / max(len(values), 1)), values[0] if values else 0.0, []
    for value in values:
        mean += weight * (value - mean)
        out.append(mean)
    return out


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
