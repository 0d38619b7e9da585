"""Figures with captions, read from any of the files that carry them, and taken from the domains in turn."""

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.data.caption_files import iter_captions
from llava.errors import LlavaError
from llava.record_content import (
    ASSISTANT,
    as_text,
    figure_domain,
    first_given,
    has_turns,
    images_of,
    read_turns,
    record_domains,
)
from llava.records import Record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figure:
    """One image's texts. `key` is LLaVA-Med's pair_id, unique in a file."""

    key: str
    caption: str
    label: str = ""
    mentions: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    image: str | None = None

    @property
    def domain(self) -> str | None:
        """The one whose turn it is taken in."""
        return next(iter(self.domains), None)


def read_figures(path: str | Path) -> list[Figure]:
    """Figures of a caption file: LLaVA-Med's ({domain: [figure, …]}), rows with a caption, or caption records.

    Rows are JSON or JSONL objects with `pair_id` (or `id`) and `fig_caption` (or `caption`); caption records are
    training records whose first answer is the caption, as the `roco` and `pmc` converters write them. A figure that is
    listed under several domains is one of all of them; those without a caption are left out, and counted in the log.

    Raises:
        LlavaError: a row without id, or an id that stands twice.
    """
    path = Path(path)
    if not path.is_file():
        raise LlavaError(f"{path}: no such file")
    figures: dict[str, Figure] = {}
    without_caption: list[str] = []
    for where, domain, row in iter_captions(path):
        figure = _figure(row, domain, where)
        if not figure.caption:
            without_caption.append(where)
            continue
        earlier = figures.get(figure.key, figure)
        joined = replace(earlier, domains=tuple(dict.fromkeys(earlier.domains + figure.domains)))
        if figure.key in figures and (domain is None or domain in earlier.domains or joined.caption != figure.caption):
            raise LlavaError(f"{where}: id {figure.key!r} stands there twice")
        figures[figure.key] = joined
    if not figures:
        raise LlavaError(f"{path}: holds no figures with a caption (fig_caption)")
    if without_caption:
        logger.warning(
            "%d figures without a caption are left out (first: %s)", len(without_caption), without_caption[0]
        )
    return list(figures.values())


def in_turn(figures: Sequence[Figure], max_size: int | None, seed: int) -> list[Figure]:
    """Up to `max_size` figures, one from each domain in turn, in a seeded random order within a domain."""
    by_domain: dict[str | None, list[Figure]] = {}
    for figure in figures:
        by_domain.setdefault(figure.domain, []).append(figure)
    queues = []
    for domain in sorted(by_domain, key=str):
        queue = sorted(by_domain[domain], key=lambda figure: figure.key)
        random.Random(f"{seed} {domain}").shuffle(queue)
        queues.append(queue)
    wanted = len(figures) if max_size is None else min(max_size, len(figures))
    taken: list[Figure] = []
    for position in range(max(map(len, queues), default=0)):
        taken += [queue[position] for queue in queues if position < len(queue)]
        if len(taken) >= wanted:
            break
    return taken[:wanted]


def _figure(row: Record, domain: str | None, where: str) -> Figure:
    key = first_given(row, "pair_id", "id")
    caption = first_given(row, "fig_caption", "caption")
    if caption is None and has_turns(row):
        caption = _first_answer(row, where)
    images = images_of(row, where)
    if len(images) > 1 or not all(isinstance(image, str) for image in images):
        raise LlavaError(f"{where}: expected one image at most, by its name")
    if key is None or not isinstance(caption, (str, int, float, type(None))):
        raise LlavaError(f"{where}: expected an id (pair_id) and a caption (fig_caption) of text")
    return Figure(
        key=str(key),
        caption="" if caption is None else as_text(caption).strip(),
        label=as_text(row.get("fig_label") or ""),
        mentions=tuple(_mentions(row.get("in_text_mention"))),
        domains=tuple(dict.fromkeys(filter(None, (domain, figure_domain(row), *record_domains(row))))),
        image=images[0] if images else None,
    )


def _first_answer(row: Record, where: str) -> str | None:
    try:
        turns = read_turns(row)
    except LlavaError as error:
        raise LlavaError(f"{where}: {error}") from error
    return next((turn.text for turn in turns if turn.role == ASSISTANT), None)


def _mentions(value: Any) -> Iterable[str]:
    """The sentences, which the released file holds as text or as {"tokens": text, "entities": …}."""
    for mention in value if isinstance(value, (list, tuple)) else [value]:
        text = mention.get("tokens") if isinstance(mention, dict) else mention
        if isinstance(text, str) and text.strip():
            yield text
