"""The figure of `llava.data.stats`: sunbursts of verb and object, domains, lengths; PNG and a self-contained page."""

import base64
import html
from collections import Counter
from pathlib import Path

from llava.data.stats_count import InstructStats
from llava.records import atomic_path

TOP_VERBS = 14
TOP_OBJECTS = 5


def write_figures(stats: InstructStats, folder: Path, title: str) -> Path:
    """Write stats.png and stats.html into `folder`; returns the page's path."""
    png = folder / "stats.png"
    figure = _draw(stats, title)
    with atomic_path(png) as temporary, temporary.open("wb") as file:
        figure.savefig(file, format="png", dpi=130)
    page = folder / "stats.html"
    with atomic_path(page) as temporary:
        temporary.write_text(_page(stats, png, title), encoding="utf-8")
    return page


def _draw(stats: InstructStats, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11), layout="constrained")
    figure.suptitle(f"{title}: {stats.records:,} records, {sum(stats.turns):,} turns", fontsize=15)
    grid = figure.add_gridspec(2, 6, height_ratios=(2.2, 1))
    _sunburst(figure.add_subplot(grid[0, :3]), stats.verbs["instructions"], "instructions: verb and object")
    _sunburst(figure.add_subplot(grid[0, 3:]), stats.verbs["responses"], "responses: verb and object")
    axes = figure.add_subplot(grid[1, :2])
    domains = stats.domains.most_common() or [("no domain given", stats.records)]
    axes.barh([name for name, _ in domains][::-1], [count for _, count in domains][::-1], color="#4c78a8")
    axes.set_title("records by domain")
    axes = figure.add_subplot(grid[1, 2:4])
    longest = max((max(values, default=1) for values in stats.lengths.values()), default=1)
    for name, colour in (("instructions", "#f58518"), ("responses", "#54a24b")):
        bins = range(0, min(longest, 200) + 5, 5)
        axes.hist([min(n, 200) for n in stats.lengths[name]], bins=bins, alpha=0.6, label=name, color=colour)
    axes.set_title("words per text (200 and more in the last bar)")
    axes.legend()
    axes = figure.add_subplot(grid[1, 4:])
    turns = Counter(stats.turns)
    axes.bar([str(count) for count in sorted(turns)], [turns[count] for count in sorted(turns)], color="#b279a2")
    axes.set_title("question-answer turns per record")
    return figure


def _sunburst(axes, pairs: Counter, title: str) -> None:
    """Inner ring: the most frequent verbs; outer ring: their most frequent objects, the rest left pale."""
    from matplotlib import colormaps

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
        colour = colormaps["tab20"](position % 20)
        sweep = 360 * verb_count / total
        _wedge(axes, start, sweep, 0.35, 0.68, colour, verb)
        objects = Counter({noun: count for (name, noun), count in pairs.items() if name == verb})
        angle = start
        for noun, count in objects.most_common(TOP_OBJECTS):
            step = 360 * count / total
            _wedge(axes, angle, step, 0.70, 1.0, (*colour[:3], 0.55), noun)
            angle -= step
        if angle > start - sweep + 1e-6:
            _wedge(axes, angle, angle - (start - sweep), 0.70, 1.0, (*colour[:3], 0.15), "")
        start -= sweep
    axes.set_xlim(-1.08, 1.08)
    axes.set_ylim(-1.08, 1.08)


def _wedge(axes, start: float, sweep: float, inner: float, outer: float, colour, text: str) -> None:
    """A ring segment going clockwise from `start` degrees, with its text along the radius where it fits."""
    from math import cos, radians, sin

    from matplotlib.patches import Wedge

    axes.add_patch(Wedge((0, 0), outer, start - sweep, start, width=outer - inner, color=colour, ec="white", lw=0.8))
    if sweep < 3.5:
        return
    middle = (start - sweep / 2) % 360
    turned = middle + 180 if 90 < middle < 270 else middle
    radius = (inner + outer) / 2
    x, y = radius * cos(radians(middle)), radius * sin(radians(middle))
    axes.text(x, y, text[:14], rotation=turned, ha="center", va="center", rotation_mode="anchor", fontsize=8.5)


def _page(stats: InstructStats, png: Path, title: str) -> str:
    image = base64.b64encode(png.read_bytes()).decode()
    tables = []
    for name, pairs in stats.verbs.items():
        rows = "".join(
            f"<tr><td>{html.escape(verb)}</td><td>{html.escape(noun)}</td><td>{count}</td></tr>"
            for (verb, noun), count in pairs.most_common(25)
        )
        missing = stats.without_pair[name]
        tables.append(
            f"<section><h2>{name}</h2><p>{missing} of {len(stats.lengths[name])} texts without a verb that has an "
            f"object.</p><table><tr><th>verb</th><th>object</th><th>count</th></tr>{rows}</table></section>"
        )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
        "img{width:100%}main{display:flex;gap:3rem;flex-wrap:wrap}td,th{padding:.1rem .8rem .1rem 0;text-align:left}"
        "</style>"
        f"<h1>{html.escape(title)}</h1><p>{stats.records} records, {stats.text_only} without an image.</p>"
        f'<img alt="verbs and objects, domains, lengths" src="data:image/png;base64,{image}">'
        f"<main>{''.join(tables)}</main></html>\n"
    )
