"""Images onto the disk, from a thread: making a file may take a disk longer than all the rest of the work on an
article, and the event loop would stand still for it.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from llava.folders import PART

_PIECE = 1 << 20
"""Bytes of an image that are gathered before they are written."""
_MOST_HELD = 32 << 20
"""Bytes that may wait while the thread is at work; more makes those who bring them wait."""


class ImageWriter:
    """Streams images to hidden files and gives them their names when whole; an asynchronous context.

    Nobody waits for the disk, unless it is far too slow: what gathers while the thread is at work is its next task.
    The context ends when all is written.

    Raises:
        OSError: from a later `write` or the context's end: the disk is full or can't be written to. Nothing more is
            written then, and what wasn't whole is removed.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="image-writer")
        self._waiting: list[tuple] = []
        self._held = 0
        self._work: asyncio.Task | None = None
        self._error: Exception | None = None

    async def __aenter__(self) -> "ImageWriter":
        return self

    async def __aexit__(self, kind, error, trace) -> None:
        try:
            if self._work is not None:
                await self._work
        finally:
            self._thread.shutdown()
        if error is None and self._error is not None:
            raise self._error

    async def write(self, path: Path, chunks: AsyncIterator[bytes]) -> None:
        """Take `chunks` and have them written to `path`; if they break off nothing is left of them."""
        temporary = _hidden(path)
        pieces, size, begun = [], 0, False
        try:
            async for chunk in chunks:
                pieces.append(chunk)
                size += len(chunk)
                if size >= _PIECE:
                    await self._put(size, _write, temporary, pieces, begun)
                    pieces, size, begun = [], 0, True
            await self._put(size, _finish, temporary, pieces, begun, path)
        except BaseException:
            self._add(0, _remove, temporary)
            raise

    async def copy(self, first: Path, path: Path) -> None:
        """Have the image `first`, written before, copied to `path`."""
        await self._put(0, _copy, _hidden(path), first, path)

    async def _put(self, size: int, *task) -> None:
        while self._held > _MOST_HELD and self._work is not None:
            await asyncio.wait([self._work])
        if self._error is not None:
            raise self._error
        self._add(size, *task)

    def _add(self, size: int, *task) -> None:
        self._waiting.append(task)
        self._held += size
        if self._work is None:
            self._work = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                tasks, self._waiting, self._held = self._waiting, [], 0
                self._error = await loop.run_in_executor(self._thread, _do_all, tasks, self._error)
        finally:
            self._work = None


def _do_all(tasks: list[tuple], error: Exception | None) -> Exception | None:
    """Do each task until one fails, and remove what the others began; returns the error."""
    for work, temporary, *args in tasks:
        try:
            (work if error is None else _remove)(temporary, *args)
        except (OSError, MemoryError, ValueError) as failure:
            error = failure
            _remove(temporary)
    return error


# The plain calls of the system: each of the many that `open` makes would hand Python's lock to and fro.


def _write(temporary: str, chunks: list[bytes], begun: bool) -> None:
    flags = os.O_APPEND if begun else os.O_CREAT | os.O_TRUNC
    file = os.open(temporary, os.O_WRONLY | flags, 0o666)
    try:
        content = memoryview(b"".join(chunks))
        while content:
            content = content[os.write(file, content) :]
    finally:
        os.close(file)


def _finish(temporary: str, chunks: list[bytes], begun: bool, path: Path) -> None:
    _write(temporary, chunks, begun)
    # Not forced to the disk one by one: that would cost more than the transfer, and what a power cut empties is
    # fetched again.
    os.replace(temporary, path)


def _copy(temporary: str, first: Path, path: Path) -> None:
    shutil.copyfile(first, temporary)
    os.replace(temporary, path)


def _remove(temporary: str, *_) -> None:
    # What can't be removed now is swept by the next start.
    with suppress(OSError):
        Path(temporary).unlink(missing_ok=True)


def _hidden(path: Path) -> str:
    return f"{path.parent}/.{path.name}{PART}"
