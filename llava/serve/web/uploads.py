"""What visitors of the web page have uploaded: whose it is, how much space it takes, how long it stays.

Every upload gets a folder of its own with a name that can't be guessed, so that two visitors who send the same file
never share one. Needs no gradio.
"""

import contextlib
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 32 << 20
KEEP_SECONDS = 600.0
BLOCK_BYTES = 4 << 10  # what a file takes at least
FILES_PER_VISITOR, FILES_IN_ALL = 2048, 8192  # so that tiny ones can't fill the file system's table
_REST = 10.0
FULL = "The server holds too many files just now. Try again in a few minutes."


class Refusal(Exception):
    """A request that isn't served: the HTTP status, and one line for the visitor that names no file."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


@dataclass(eq=False)
class Upload:
    """One request's files. `upload_id` is the name that the visitor's browser asks its progress by, `key` that of the
    visitor's API key. `size` is in bytes; `count` is of files, while they arrive of those that have begun."""

    visitor: str
    upload_id: str
    folder: Path
    key: str = ""
    since: float = field(default_factory=time.monotonic)
    size: int = 0
    count: int = 0
    is_whole: bool = False
    is_used: bool = False
    """Whether its visitor has named one of its files in a call."""
    paths: list[str] = field(default_factory=list)
    progress: Counter = field(default_factory=Counter)

    # gradio's multipart parser calls these two.
    def append(self, upload_id: str, filename: str, content: bytes) -> None:
        self.progress[filename] += len(content)

    def set_done(self, upload_id: str) -> None:
        """The files are in place only after the parser's end; `Uploads.arriving` says when."""


class Uploads:
    """The record of all uploads.

    Args:
        folder: where they lie; each gets a folder of its own below it.
        per_visitor, in_all: bytes that one visitor, and all together, may have here at a time.
        keep_seconds: what nobody has asked about after this time is deleted.
        files_per_visitor, files_in_all: how many files.
    """

    def __init__(
        self,
        folder: Path,
        per_visitor: int,
        in_all: int,
        keep_seconds: float = KEEP_SECONDS,
        files_per_visitor: int = FILES_PER_VISITOR,
        files_in_all: int = FILES_IN_ALL,
    ):
        self.folder, self.per_visitor, self.in_all = folder, per_visitor, in_all
        self.files_per_visitor, self.files_in_all = files_per_visitor, files_in_all
        self.keep_seconds = keep_seconds
        self._uploads: dict[Upload, None] = {}
        """In the order in which they came."""
        self._named: dict[tuple[str, str], Upload] = {}
        """By visitor and name."""
        self._sweep_again = 0.0  # when
        self._owners: dict[str, Upload] = {}
        self._sizes: Counter[str] = Counter()  # bytes by visitor
        self._counts: Counter[str] = Counter()  # files by visitor

    @contextlib.contextmanager
    def arriving(self, visitor: str, upload_id: str = "", key: str = "") -> Iterator[Upload]:
        """An upload to write into; unless the block ends well, nothing of it stays."""
        self.sweep()
        upload = Upload(visitor, upload_id, self.folder / secrets.token_urlsafe(24), key)
        self._uploads[upload] = None
        self._named[visitor, upload_id] = upload
        try:
            upload.folder.mkdir(mode=0o700, parents=True)
            yield upload
        except BaseException as error:
            gave_way = upload not in self._uploads
            self._forget(upload)
            if gave_way and isinstance(error, OSError):  # its folder is gone
                raise Refusal(503, FULL) from None
            raise
        self._settle(upload)
        if upload not in self._uploads:
            raise Refusal(503, FULL)
        self._owners.update(dict.fromkeys(upload.paths, upload))
        upload.is_whole = True

    def grow(self, upload: Upload, size: int, count: int = 0) -> None:
        """Take space for `size` more bytes and `count` more files. Near the total others' uploads give way: the oldest
        that were never used; then of those who hold more than this visitor, who holds most first.

        Raises:
            Refusal: the visitor would have too many, or nothing may give way; or this one has given way.
        """
        if self._sizes[upload.visitor] + size > self.per_visitor:
            raise Refusal(413, f"You have more than {self.per_visitor >> 20} MiB of files here. Ask about them first.")
        if self._counts[upload.visitor] + count > self.files_per_visitor:
            raise Refusal(413, f"You have more than {self.files_per_visitor} files here. Ask about them first.")
        while upload in self._uploads and not self._has_space(size, count):
            self._give_way(upload)
        if upload not in self._uploads:
            raise Refusal(503, FULL)
        self._add(upload, size, count)

    def _add(self, upload: Upload, size: int, count: int) -> None:
        upload.size += size
        upload.count += count
        for held, more in ((self._sizes, size), (self._counts, count)):
            held[upload.visitor] += more
            if held[upload.visitor] <= 0:
                del held[upload.visitor]

    def _has_space(self, size: int, count: int) -> bool:
        return self._sizes.total() + size <= self.in_all and self._counts.total() + count <= self.files_in_all

    def _give_way(self, upload: Upload) -> None:
        """One upload of somebody else goes."""
        others = [each for each in self._uploads if each.visitor != upload.visitor]
        oldest = next((each for each in others if each.is_whole and not each.is_used), None)
        if oldest is not None:
            return self._forget(oldest)
        held = self._held()

        def share(one: Upload) -> tuple[float, float]:
            return held[one.key], held[one.key, one.visitor]

        most = max(others, key=share, default=upload)
        if share(most) <= share(upload):
            raise Refusal(503, FULL)
        self._forget(most)

    def _held(self) -> Counter[Any]:
        """The share of the space that each key holds, and each visitor with a key; files count as much as bytes."""
        held: Counter[Any] = Counter()
        for each in self._uploads:
            share = max(each.size / self.in_all, each.count / self.files_in_all)
            held[each.key] += share  # type: ignore[assignment]
            held[each.key, each.visitor] += share  # type: ignore[assignment]
        return held

    def belongs(self, path: str, visitor: str) -> bool:
        """Whether `path` is, letter for letter, what an upload of this visitor was answered with, and still there."""
        upload = self._owners.get(path)
        return upload is not None and upload.visitor == visitor and Path(path).is_file()

    def use(self, path: str, visitor: str) -> bool:
        """The same for a call that names it; from then on it gives way later."""
        belongs = self.belongs(path, visitor)
        if belongs:
            self._owners[path].is_used = True
        return belongs

    def find(self, visitor: str, upload_id: str) -> Upload | None:
        """The visitor's upload of this name, arriving or whole."""
        return self._named.get((visitor, upload_id))

    def sweep(self) -> None:
        """Delete what is too old, and count no more what the page has read and deleted.

        It looks at every file, and each upload asks for it: so not before `_REST` times as long has gone by as it took.
        """
        began = time.monotonic()
        if began < self._sweep_again:
            return
        oldest = began - self.keep_seconds
        for upload in [each for each in self._uploads if each.is_whole]:
            if upload.since < oldest:
                self._forget(upload)
            else:
                self._settle(upload)
        ended = time.monotonic()
        self._sweep_again = ended + _REST * (ended - began)

    def _settle(self, upload: Upload) -> None:
        """Count the files that are there in place of the bytes that came."""
        found = {path: _size(path) for path in upload.paths}
        sizes = {path: size for path, size in found.items() if size is not None}
        for path in set(upload.paths) - set(sizes):
            self._owners.pop(path, None)
        if not sizes:
            self._forget(upload)
            return
        size = sum(max(each, BLOCK_BYTES) for each in sizes.values())
        self._add(upload, size - upload.size, len(sizes) - upload.count)
        upload.paths = list(sizes)

    def _forget(self, upload: Upload) -> None:
        shutil.rmtree(upload.folder, ignore_errors=True)
        for path in upload.paths:
            self._owners.pop(path, None)
        if upload in self._uploads:
            del self._uploads[upload]
            if self._named.get((upload.visitor, upload.upload_id)) is upload:
                del self._named[upload.visitor, upload.upload_id]
            self._add(upload, -upload.size, -upload.count)


def _size(path: str) -> int | None:
    """In bytes; None once the page has read and deleted it, which it may do at any moment."""
    try:
        return Path(path).stat().st_size
    except FileNotFoundError:
        return None


class WrittenFiles:
    """Files that the page has written for browsers to fetch; each goes after `keep_seconds`.

    gradio's own task for this ends for good when a file comes while it looks through their names.

    Args:
        sets: gradio's sets of the files' names.
    """

    def __init__(self, sets: Iterable[set[str]], keep_seconds: float = KEEP_SECONDS):
        self.sets, self.keep_seconds = sets, keep_seconds
        self._since: dict[str, float] = {}

    def sweep(self) -> None:
        """Delete those that have been known long enough."""
        now = time.monotonic()
        known = {name for names in self.sets for name in names.copy()}  # a copy is made in one piece
        self._since = {name: self._since.get(name, now) for name in known}
        old = {name for name, since in self._since.items() if since < now - self.keep_seconds}
        for name in old:
            Path(name).unlink(missing_ok=True)
        for names in self.sets:
            names -= old
