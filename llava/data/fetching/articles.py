"""The list of wanted images, grouped by article: one request per archive, however many figures come out of it."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llava.data.conversion import is_inside
from llava.data.fetching.addresses import is_http
from llava.errors import LlavaError
from llava.records import Record, iter_jsonl

OA_SERVICE = "https://www.ncbi.nlm.nih.gov/pmc/utils/oa/oa.fcgi"
"""PubMed Central's, which says where the archive of an open-access article lies now."""
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_FIELDS = ("pair_id", "pmc_tar_url", "image_file_path")


@dataclass(frozen=True, slots=True)
class Image:
    """A wanted member of an archive; it is saved as `<pair_id>.jpg`, whatever the archive calls it."""

    number: int
    """Its place in the list, from 0."""
    pair_id: str
    member: str


@dataclass(slots=True)
class Article:
    """An archive and the images wanted from it."""

    url: str
    images: list[Image] = field(default_factory=list)

    @property
    def pmc_id(self) -> str | None:
        """PubMed Central's number of the article, if its address has one."""
        match = re.search(r"PMC\d+", self.url)
        return match[0] if match else None

    @property
    def archive_name(self) -> str:
        """A file name for the archive, safe whatever the address holds: PubMed Central's own, which names one article
        alone, or one that no other address has."""
        name = urlsplit(self.url).path.rsplit("/", 1)[-1]
        if re.fullmatch(r"PMC\d{1,20}\.tar\.gz", name):
            return name
        return f"{hashlib.sha256(self.url.encode()).hexdigest()[:16]}.tar.gz"


@dataclass
class Plan:
    """What a list asks for. Entries that can't be fetched safely are refused, each with its reason."""

    articles: list[Article]
    images: int
    refused: list[tuple[Image, str, str]]
    """(image, address, reason)."""
    duplicates: int
    """Lines that say what an earlier one says."""


def read_plan(path: str | Path, limit: int | None = None) -> Plan:
    """Read a list of `{"pair_id", "pmc_tar_url", "image_file_path"}` lines (or its first `limit`).

    It is read whole before anything is fetched, so that a bad line shows at once.

    Raises:
        LlavaError: a line isn't such an object; the message names it.
    """
    articles: dict[str, Article] = {}
    seen: dict[str, tuple[str, str]] = {}
    plan = Plan([], 0, [], 0)
    for number, (pair_id, url, member) in enumerate(islice(_rows(path), limit)):
        if seen.get(pair_id) == (url, member):
            plan.duplicates += 1
            continue
        image = Image(number, pair_id, member.removeprefix("./"))
        reason = _why_refused(image, url)
        if reason is None and pair_id in seen:
            reason = "the same pair_id was listed before with another image"
        plan.images += 1
        if reason:
            plan.refused.append((image, url, reason))
            continue
        seen[pair_id] = (url, member)
        articles.setdefault(url, Article(url)).images.append(image)
    plan.articles = list(articles.values())
    if not plan.images:
        raise LlavaError(f"{path}: the list is empty")
    return plan


def _rows(path: str | Path) -> Iterator[tuple[str, str, str]]:
    for line, row in iter_jsonl(path):
        values: list[Any] = [row.get(name) for name in _FIELDS]
        if not all(isinstance(value, str) and value for value in values):
            raise LlavaError(f"{path} line {line}: expected text in {', '.join(_FIELDS)}, got {_shown(row)}")
        yield values[0], values[1], values[2]


def _why_refused(image: Image, url: str) -> str | None:
    if not _SAFE_NAME.fullmatch(image.pair_id):
        return "pair_id is no safe file name"
    if not is_inside(image.member):
        return "image_file_path leads out of the archive's folder"
    return None if is_http(url) else "pmc_tar_url is no http(s) address"


def _shown(row: Record) -> str:
    return repr(row)[:200]
