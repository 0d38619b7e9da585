"""The figures of `llava.data.stats`: sunbursts of verb and object, domains, lengths, turns; as PNG and as a page."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llava.data.stats_count import InstructStats
from llava.errors import amount
from llava.pages import figure, figures, note, table, what_was_run, write_page
from llava.pages.charts import COLORS, INK, PAPER, chart, style
from llava.records import atomic_path

TOP_VERBS = 14
TOP_OBJECTS = 5
LONGEST = 200
"""Words from which on texts are counted together."""


def write_figures(stats: InstructStats, folder: Path, title: str, run: Mapping[str, Any]) -> Path:
    """Write stats.png and stats.html into `folder`; returns the page's path. `run`: what the page says was run."""
    with atomic_path(folder / "stats.png") as temporary:
        _write_png(stats, temporary, f"{title}: {amount(stats.records, 'record')}, {amount(sum(stats.turns), 'turn')}")
    names = ("instructions", "responses")
    bursts = [_verbs(stats, name) for name in names]
    counts = [figure(chart(partial(draw, stats=stats), caption, 300), caption) for draw, caption in _COUNTS]
    return write_page(
        folder / "stats.html",
        title,
        f"{amount(stats.records, 'record')}, {amount(sum(stats.turns), 'turn')}; "
        f"{amount(stats.text_only, 'record')} without an image.",
        [
            ("What is asked and answered", figures(*bursts)),
            ("Domains, lengths, turns", figures(*counts)),
            *((f"{name.capitalize()}: verb and object", _pairs(stats, name)) for name in names),
            what_was_run(run),
        ],
    )


def _verbs(stats: InstructStats, name: str) -> Markup:
    pairs = stats.verbs[name]
    most = ", ".join(f"{verb} {noun} {count}" for (verb, noun), count in pairs.most_common(5))
    shown = chart(
        partial(_sunburst, pairs=pairs, title=name), f"Verbs and objects of the {name}, most often {most}", 460
    )
    rings = f"The {TOP_VERBS} most frequent verbs (inner ring) and their objects (outer ring)"
    return figure(shown, f"{rings} in {name}.")


def _pairs(stats: InstructStats, name: str) -> Markup:
    """The most frequent pairs, and how many texts have none."""
    rows = [[verb, noun, f"{count:,}"] for (verb, noun), count in stats.verbs[name].most_common(25)]
    missing, texts = stats.without_pair[name], len(stats.lengths[name])
    said = note(f"{missing:,} of {texts:,} texts without a verb that has an object.")
    return said + table(["verb", "object", "count"], rows)


def _write_png(stats: InstructStats, path: Path, title: str) -> None:
    """All of them in one image, on paper white."""
    from matplotlib.figure import Figure

    with style():
        image = Figure(figsize=(15, 11), layout="constrained", facecolor=PAPER)
        image.suptitle(title, fontsize=15)
        grid = image.add_gridspec(2, 6, height_ratios=(2.2, 1))
        for place, name in enumerate(("instructions", "responses")):
            _sunburst(image.add_subplot(grid[0, 3 * place : 3 * place + 3]), stats.verbs[name], name)
        for place, (draw, _) in enumerate(_COUNTS):
            draw(image.add_subplot(grid[1, 2 * place : 2 * place + 2]), stats)
        image.savefig(path, format="png", dpi=130)


def _domains(axes, stats: InstructStats) -> None:
    domains = stats.domains.most_common() or [("no domain given", stats.records)]
    axes.barh([name for name, _ in domains][::-1], [count for _, count in domains][::-1], color=COLORS[0])
    axes.grid(axis="y", visible=False)
    # A few bars stay as thin as many.
    axes.set(
        title="records by domain",
        xlabel="records",
        ylim=(len(domains) - 0.5 - max(4, len(domains)), len(domains) - 0.5),
    )


def _lengths(axes, stats: InstructStats) -> None:
    longest = max((max(values, default=1) for values in stats.lengths.values()), default=1)
    bins = range(0, min(longest, LONGEST) + 5, 5)
    for name, color in (("instructions", COLORS[1]), ("responses", COLORS[2])):
        axes.hist([min(n, LONGEST) for n in stats.lengths[name]], bins=bins, alpha=0.6, label=name, color=color)
    words = "words" if longest <= LONGEST else f"words ({LONGEST} and more in the last bar)"
    axes.set(title="words per text", xlabel=words, ylabel="texts")
    axes.legend()


def _turns(axes, stats: InstructStats) -> None:
    turns = Counter(stats.turns)
    axes.bar([str(count) for count in sorted(turns)], [turns[count] for count in sorted(turns)], color=COLORS[3])
    axes.grid(axis="x", visible=False)
    axes.set(
        title="turns per record",
        xlabel="question-answer turns",
        ylabel="records",
        xlim=(-0.5, max(4, len(turns)) - 0.5),
    )


_COUNTS: tuple[tuple[Callable, str], ...] = (
    (_domains, "Records by domain."),
    (_lengths, "Lengths of instructions and responses in words."),
    (_turns, "Question-answer turns per record."),
)


def _sunburst(axes, pairs: Counter, title: str) -> None:
    """Inner ring: the most frequent verbs; outer ring: their most frequent objects, the rest left pale."""
    axes.set_title(title)
    axes.set_aspect("equal")
    axes.set_axis_off()
    verbs: Counter = Counter()
    for (verb, _), count in pairs.items():
        verbs[verb] += count
    top = verbs.most_common(TOP_VERBS)
    if not top:
        axes.text(0, 0, "no verb with an object", ha="center")
        return
    total = sum(count for _, count in top)
    start = 90.0
    for position, (verb, verb_count) in enumerate(top):
        color = COLORS[position % len(COLORS)]
        sweep = 360 * verb_count / total
        _wedge(axes, start, sweep, 0.35, 0.68, color, 1.0, verb)
        objects = Counter({noun: count for (name, noun), count in pairs.items() if name == verb})
        angle = start
        for noun, count in objects.most_common(TOP_OBJECTS):
            step = 360 * count / total
            _wedge(axes, angle, step, 0.70, 1.0, color, 0.45, noun)
            angle -= step
        if angle > start - sweep + 1e-6:
            _wedge(axes, angle, angle - (start - sweep), 0.70, 1.0, color, 0.12, "")
        start -= sweep
    axes.set_xlim(-1.08, 1.08)
    axes.set_ylim(-1.08, 1.08)


def _wedge(axes, start: float, sweep: float, inner: float, outer: float, color: str, alpha: float, text: str) -> None:
    """A ring segment going clockwise from `start` degrees, with its text along the radius where it fits."""
    from math import cos, radians, sin

    from matplotlib.patches import Wedge

    ring: Any = {"width": outer - inner, "facecolor": color, "alpha": alpha, "edgecolor": PAPER, "linewidth": 0.8}
    axes.add_patch(Wedge((0, 0), outer, start - sweep, start, **ring))
    if sweep < 4:
        return
    middle = (start - sweep / 2) % 360
    turned = middle + 180 if 90 < middle < 270 else middle
    radius = (inner + outer) / 2
    x, y = radius * cos(radians(middle)), radius * sin(radians(middle))
    ink = PAPER if alpha == 1.0 else INK
    place: Any = {"ha": "center", "va": "center", "rotation_mode": "anchor", "rotation": turned}
    axes.text(x, y, text[:14], fontsize=9.5, color=ink, **place)
