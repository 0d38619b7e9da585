"""Pages that need nothing but themselves: no script, nothing fetched, so that they open anywhere, also years later.

A page is a list of sections, each a heading and what the functions here return. Text is escaped by the templates
(jinja2 with autoescape); `Markup` is what went through them.
"""

import base64
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from llava.constants import RESEARCH_NOTICE
from llava.records import atomic_path

IMAGE_SIDE = 280
"""Pixels of the longer side of an image on a page."""


@dataclass(frozen=True)
class Card:
    """A question about an image with the reference and a model's answer."""

    image: Image.Image | None
    question: str
    reference: str
    answer: str
    right: bool
    kind: str = ""
    """Of question; galleries can be narrowed to one."""

    @property
    def source(self) -> str | None:
        return None if self.image is None else data_url(self.image)


def write_page(
    path: str | Path, title: str, summary: str, sections: Sequence[tuple[str, Markup]], *, overwrite: bool = True
) -> Path:
    """Write the page as `llava.records.atomic_path` does; sections that are empty are left out. The research notice
    stands on top."""
    path = Path(path)
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(page_text(title, summary, sections), encoding="utf-8")
    return path


def page_text(title: str, summary: str, sections: Sequence[tuple[str, Markup]]) -> str:
    """What `write_page` writes."""
    sections = [(heading, body) for heading, body in sections if body]
    page = _environment().get_template("page.html")
    return page.render(title=title, summary=summary, sections=sections, notice=RESEARCH_NOTICE) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> Markup:
    """Rows of cells; numbers don't break. `classes`: one per row or "" ("published": numbers of others)."""
    padded = [*classes, *[""] * (len(rows) - len(classes))]
    return _part("table", header, list(zip(padded, rows)))


def figure(chart: Markup, caption: str) -> Markup:
    """A chart of `llava.pages.charts` with its caption; figures are numbered by the page."""
    return _part("figure", chart, caption)


def picture(url: str, words: str) -> Markup:
    """An image inside a data: URL, in its own size where there is space, with words below it."""
    return _part("picture", url, words)


def figures(*shown: Markup) -> Markup:
    """Figures side by side where there is space for it, else below each other."""
    return _part("figures", [one for one in shown if one])


def gallery(shown: Sequence[Card], title: str = "") -> Markup:
    """Questions and answers with their images, with buttons for right or wrong answers and for each kind of question.

    No script is needed. `title` tells galleries of the same questions on a page apart; it isn't shown.
    """
    kinds = list(dict.fromkeys(card.kind for card in shown if card.kind))
    content = [(title, card.question, card.answer, card.kind) for card in shown]
    name = f"g{zlib.crc32(repr(content).encode()):x}"
    return _part("gallery", shown, kinds if len(kinds) > 1 else [], name)


def preformatted(lines: Sequence[str]) -> Markup:
    """Lines as a block that keeps its indentation."""
    return _part("preformatted", "\n".join(lines))


def folded(title: str, body: Markup) -> Markup:
    """What is shown once its title is clicked, and in print."""
    return _part("folded", title, body)


def what_was_run(run: Mapping[str, Any]) -> tuple[str, Markup]:
    """The last section of a page: the settings, files and versions of the run that it shows, as JSON."""
    lines = json.dumps(run, indent=2, ensure_ascii=False, default=str).splitlines()
    return "What was run", folded("Settings, files, versions", preformatted(lines))


def warning(text: str) -> Markup:
    """A remark that must not be overlooked, bold."""
    return _part("warning", text)


def note(text: str) -> Markup:
    """A remark in small type."""
    return _part("note", text)


def subheading(text: str) -> Markup:
    """A heading inside a section."""
    return _part("subheading", text)


def data_url(image: Image.Image, side: int = IMAGE_SIDE) -> str:
    """The image inside a URL, at most `side` pixels wide and high; small drawn ones are enlarged and stay sharp."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    if max(small.size) <= side // 2:
        scale = side // max(small.size)
        small = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@lru_cache
def _environment() -> Environment:
    loader = PackageLoader("llava.pages")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["number"] = _is_number
    return environment


def _part(name: str, *args: Any) -> Markup:
    return getattr(_environment().get_template("parts.html").module, name)(*args)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or (cell[:1] in {"+", "-", "−"} and len(cell) > 1)
