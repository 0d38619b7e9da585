"""What visitors of the web page have uploaded: whose it is, how much space it takes, how long it stays.

Every upload gets a folder of its own with a name that can't be guessed, so that two visitors who send the same file
never share one. Needs no gradio.
"""

import contextlib
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAX_FILE_BYTES = 32 << 20
KEEP_SECONDS = 600.0
SMALLEST_BYTES = 256 << 10  # what a file counts for at least, so that tiny ones can't fill the file system's table


class Refusal(Exception):
    """A request that isn't served: the HTTP status, and one line for the visitor that names no file."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


@dataclass(eq=False)
class Upload:
    """One request's files. `upload_id` is the name that the visitor's browser asks its progress by."""

    visitor: str
    upload_id: str
    folder: Path
    since: float = field(default_factory=time.monotonic)
    size: int = 0
    is_whole: bool = False
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
    """

    def __init__(self, folder: Path, per_visitor: int, in_all: int, keep_seconds: float = KEEP_SECONDS):
        self.folder, self.per_visitor, self.in_all = folder, per_visitor, in_all
        self.keep_seconds = keep_seconds
        self._uploads: dict[Upload, None] = {}
        self._owners: dict[str, str] = {}
        self._used: Counter[str] = Counter()  # bytes by visitor

    @contextlib.contextmanager
    def arriving(self, visitor: str, upload_id: str = "") -> Iterator[Upload]:
        """An upload to write into; unless the block ends well, nothing of it stays."""
        self.sweep()
        upload = Upload(visitor, upload_id, self.folder / secrets.token_urlsafe(24))
        self._uploads[upload] = None
        try:
            self.grow(upload, SMALLEST_BYTES)
            upload.folder.mkdir(mode=0o700, parents=True)
            yield upload
        except BaseException:
            self._forget(upload)
            raise
        self._settle(upload)
        self._owners.update(dict.fromkeys(upload.paths, visitor))
        upload.is_whole = True

    def grow(self, upload: Upload, count: int) -> None:
        """Take space for `count` more bytes.

        Raises:
            Refusal: the visitor, or all visitors together, would have too many.
        """
        if self._used[upload.visitor] + count > self.per_visitor:
            raise Refusal(413, f"You have more than {self.per_visitor >> 20} MiB of files here. Ask about them first.")
        if self._used.total() + count > self.in_all:
            raise Refusal(503, "The server holds too many files just now. Try again in a few minutes.")
        upload.size += count
        self._used[upload.visitor] += count

    def belongs(self, path: str, visitor: str) -> bool:
        """Whether `path` is, letter for letter, what an upload of this visitor was answered with, and still there."""
        return self._owners.get(path) == visitor and Path(path).is_file()

    def find(self, visitor: str, upload_id: str) -> Upload | None:
        """The visitor's upload of this name, arriving or whole."""
        return next((each for each in self._uploads if (each.visitor, each.upload_id) == (visitor, upload_id)), None)

    def sweep(self) -> None:
        """Delete what is too old, and count no more what the page has read and deleted."""
        oldest = time.monotonic() - self.keep_seconds
        for upload in [each for each in self._uploads if each.is_whole]:
            if upload.since < oldest:
                self._forget(upload)
            else:
                self._settle(upload)

    def _settle(self, upload: Upload) -> None:
        """Count the files that are there in place of the bytes that came."""
        found = {path: _size(path) for path in upload.paths}
        sizes = {path: size for path, size in found.items() if size is not None}
        for path in set(upload.paths) - set(sizes):
            self._owners.pop(path, None)
        if not sizes:
            self._forget(upload)
            return
        size = sum(max(each, SMALLEST_BYTES) for each in sizes.values())
        self._used[upload.visitor] += size - upload.size
        upload.size, upload.paths = size, list(sizes)

    def _forget(self, upload: Upload) -> None:
        shutil.rmtree(upload.folder, ignore_errors=True)
        for path in upload.paths:
            self._owners.pop(path, None)
        self._used[upload.visitor] -= upload.size
        if self._used[upload.visitor] <= 0:
            del self._used[upload.visitor]
        self._uploads.pop(upload, None)


def _size(path: str) -> int | None:
    """In bytes; None once the page has read and deleted it, which it may do at any moment."""
    try:
        return Path(path).stat().st_size
    except FileNotFoundError:
        return None
