"""Many articles at once: tasks that each take the next one, fetch it, and save its wanted images.

Tasks of one event loop, not threads: those would take longer to hand Python's lock over than to do the work. Only
the disk has a thread.
"""

import asyncio
import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llava.bars import tqdm
from llava.data.fetching.archive import ArchiveError, Member, TarReader
from llava.data.fetching.articles import Article, Image
from llava.data.fetching.journal import Journal
from llava.data.fetching.settings import Settings
from llava.data.fetching.transfer import Transfer, TransferError
from llava.data.fetching.writer import ImageWriter
from llava.errors import LlavaError
from llava.folders import PART
from llava.resumable import write_whole

logger = logging.getLogger(__name__)

_CHECK_DISK_EVERY = 200


@dataclass
class Totals:
    """What a run did."""

    saved: int = 0
    saved_bytes: int = 0
    received_bytes: int = 0
    requests: int = 0
    saved_pairs: set[str] = field(default_factory=set)


def download(articles: Iterable[Article], journal: Journal, settings: Settings, progress: tqdm | None = None) -> Totals:
    """Fetch every article; images and failures go to `journal`.

    Raises:
        LlavaError: the disk is full, or the network is down; what is done is kept, and a new run goes on from there.
    """
    try:
        return asyncio.run(_Run(iter(articles), journal, settings, progress).work())
    except OSError as error:
        raise LlavaError(f"{journal.folder}: can't be written to ({error.strerror or error})") from error


class _Run:
    """What the tasks of one download share."""

    def __init__(self, articles, journal: Journal, settings: Settings, progress: tqdm | None):
        self.articles = articles
        self.journal = journal
        self.settings = settings
        self.progress = progress
        self.totals = Totals()
        self._taken = 0
        self._unreachable = 0

    async def work(self) -> Totals:
        if self.settings.keep_archives is not None:
            for left in self.settings.keep_archives.glob(f".*{PART}"):  # by a run that was killed
                left.unlink(missing_ok=True)
        async with ImageWriter() as self.writer, Transfer(self.settings.limits) as transfer:
            tasks = [asyncio.create_task(self._fetch_all(transfer)) for _ in range(self.settings.connections)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self.totals.received_bytes = transfer.bytes
        return self.totals

    async def _fetch_all(self, transfer: Transfer) -> None:
        while (article := self._next()) is not None:
            result = await _fetch(article, transfer, self)
            self._account(article, result, transfer)

    def _next(self) -> Article | None:
        if self._taken % _CHECK_DISK_EVERY == 0:
            self._check_disk()
        self._taken += 1
        return next(self.articles, None)

    def _check_disk(self) -> None:
        free, keep = shutil.disk_usage(self.journal.folder).free, self.settings.min_free_bytes
        if free < keep:
            raise LlavaError(
                f"{self.journal.folder}: only {free / 1e9:.1f} GB free, {keep / 1e9:.1f} GB are to stay free "
                f"(--min-free-gb); free some space and start again: it goes on from here"
            )

    def _account(self, article: Article, result: "_Result", transfer: Transfer) -> None:
        for image in article.images:
            if image.number not in result.saved:
                reason, permanent = result.why(image)
                self.journal.add_failure(image, article.url, reason, permanent)
        totals = self.totals
        totals.saved += len(result.saved)
        totals.saved_pairs.update(image.pair_id for image in article.images if image.number in result.saved)
        totals.saved_bytes += sum(result.saved.values())
        totals.requests += result.requests
        if self.progress is not None:
            self.progress.update(len(article.images))
            self.progress.set_postfix_str(f"{transfer.bytes / 1e6:,.0f} MB received", refresh=False)
        self._unreachable = self._unreachable + 1 if result.reason.startswith("no connection") else 0
        if self._unreachable >= self.settings.give_up_after:
            raise LlavaError(
                f"{self._unreachable} articles in a row couldn't be connected to ({result.reason}); is the network "
                f"up? Start again when it is: it goes on from here"
            )


@dataclass
class _Result:
    """What came of one article."""

    saved: dict[int, int] = field(default_factory=dict)
    """Bytes saved, by the image's number."""
    reasons: dict[int, tuple[str, bool]] = field(default_factory=dict)
    """Why an image that was found couldn't be taken, and whether that is for good."""
    reason: str = ""
    """Why the rest of the archive couldn't be read; empty if it was read to the end."""
    permanent: bool = True
    requests: int = 0

    def why(self, image: Image) -> tuple[str, bool]:
        if image.number in self.reasons:
            return self.reasons[image.number]
        return (self.reason, self.permanent) if self.reason else ("not in the archive", True)

    def wanted(self, article: Article) -> dict[str, list[Image]]:
        """Images still to be found, by their name in the archive (two pairs may share one member)."""
        wanted: dict[str, list[Image]] = {}
        for image in article.images:
            if image.number not in self.saved and image.number not in self.reasons:
                wanted.setdefault(image.member, []).append(image)
        return wanted


async def _fetch(article: Article, transfer: Transfer, run: _Run) -> _Result:
    """Try the kept archive, the article's own address, then the one that the open-access service gives."""
    result = _Result()
    kept = run.settings.keep_archives / article.archive_name if run.settings.keep_archives else None
    if kept is not None and kept.is_file():
        with _Kept(kept) as source:
            await _take(article, source, result, run)
        if not result.reason:
            return result
    await _try_address(article, article.url, transfer, result, run, kept)
    service, pmc_id = run.settings.oa_service, article.pmc_id
    if result.reason and result.wanted(article) and service and pmc_id:
        first = result.reason, result.permanent
        try:
            result.requests += 1
            other = await transfer.second_source(pmc_id, service)
        except TransferError as error:
            logger.debug("open-access service, %s: %s", pmc_id, error.reason)
            other = None
        if other and other != article.url:
            await _try_address(article, other, transfer, result, run, kept)
        if result.reason:
            result.reason, result.permanent = first
    return result


async def _try_address(
    article: Article, url: str, transfer: Transfer, result: _Result, run: _Run, kept: Path | None
) -> None:
    async def attempt() -> None:
        result.requests += 1
        try:
            async with transfer.open(url) as body:
                if kept is None:
                    await _take(article, body, result, run)
                else:
                    async with _Tee(body, kept) as copy:
                        await _take(article, copy, result, run)
                        if result.reason:  # what can't be read isn't kept
                            raise TransferError(result.reason, result.permanent)
        except TransferError as error:
            result.reason, result.permanent = error.reason, error.permanent
            if result.wanted(article):
                raise
        if result.reason and result.wanted(article):
            raise TransferError(result.reason, result.permanent)

    with suppress(TransferError):  # `result` says why
        await transfer.retrying(attempt)


async def _take(article: Article, source, result: _Result, run: _Run) -> None:
    """Save the wanted members of an archive as they come by; stops when all are found."""
    result.reason, result.permanent = "", True
    wanted = result.wanted(article)
    reader = TarReader(source, run.settings.limits.max_unpacked_bytes)
    try:
        async for member in reader:
            if member.name in wanted:
                cap = run.settings.limits.max_image_bytes
                fault = _why_not(member, cap)
                if fault is None:
                    await _save(wanted.pop(member.name), member, result, run)
                else:
                    result.reasons.update((image.number, (fault, True)) for image in wanted[member.name])
                    # A later member of the same name may still be a proper one; after a bomb none is looked for.
                    if member.size > cap:
                        del wanted[member.name]
            if not wanted:
                return
    except ArchiveError as error:
        result.reason, result.permanent = str(error), error.permanent
    except EOFError:
        result.reason, result.permanent = "the archive is cut short", False


def _why_not(member: Member, cap: int) -> str | None:
    if not member.is_file:
        return f"it is a {member.kind} in the archive"
    if member.size > cap:
        return f"larger than the cap of {cap:,} bytes"
    return None if member.size else "empty in the archive"


async def _save(images: list[Image], member: Member, result: _Result, run: _Run) -> None:
    """Save a member; further pairs of one member get copies."""
    paths = [run.journal.path_of(image) for image in images]
    size = member.size
    await run.writer.write(paths[0], member.chunks())
    for path in paths[1:]:
        await run.writer.copy(paths[0], path)
    result.saved.update((image.number, size) for image in images)


class _Kept:
    """An archive that was kept, as a source."""

    def __init__(self, path: Path):
        self._file = path.open("rb")

    def __enter__(self) -> "_Kept":
        return self

    async def read(self) -> bytes:
        return self._file.read(1 << 16)

    def __exit__(self, *_) -> None:
        self._file.close()


class _Tee:
    """A source that also writes what is read through it, and at the end the rest, to a file."""

    def __init__(self, source, path: Path):
        self._source = source
        self._path = path

    async def __aenter__(self) -> "_Tee":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._path.with_name(f".{self._path.name}.{id(self)}{PART}")
        self._file = self._temporary.open("wb", buffering=0)
        return self

    async def read(self) -> bytes:
        chunk = await self._source.read()
        write_whole(self._file, chunk)
        return chunk

    async def __aexit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                while await self.read():
                    pass
                self._file.close()
                os.replace(self._temporary, self._path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
