"""Records of serving on disk, only where they were asked for: one JSONL file per day (UTC), deleted in time.

Files have mode 0600, their folder 0700. Several processes may write to one folder; a line that was cut short, by a
kill or a full disk, is removed before the next one is written.
"""

import asyncio
import contextlib
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from llava.errors import LlavaError
from llava.folders import expanded
from llava.records import sound_text
from llava.resumable import write_whole
from llava.serve.transport.background import repeating

logger = logging.getLogger(__name__)

TIDY_SECONDS = 3600.0
LOCK_SECONDS = 10.0
STEADY_SECONDS = 60.0
"""Between two looks for old files, the clock may gain or lose so much against one that nobody sets."""
_BLOCK = 1 << 16


class DailyLog:
    """Records in `folder/YYYY-MM-DD.jsonl`; a file is deleted when its day has been over for `keep_days`.

    Raises:
        LlavaError: the folder is open to others, or `keep_days` is no number of days.
    """

    def __init__(self, folder: str | Path, keep_days: float):
        if not keep_days >= 0:
            raise LlavaError(f"{folder}: logs can't be kept for {keep_days:g} days; give 0 or more")
        self.folder, self.keep_days = expanded(folder), keep_days
        self.lost = 0
        self._counting = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.folder.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise LlavaError(f"{self.folder} can be read by others; run: chmod 700 {self.folder}")
        self._clock_offset = _clock_offset()
        self.drop_old()

    def write(self, record: dict[str, Any]) -> bool:
        """Add a record, with the time; False where the system refuses it, which is counted and logged. May block."""
        now = datetime.now(UTC)
        path = self.folder / f"{now:%Y-%m-%d}.jsonl"
        line = json.dumps({"time": now.isoformat(timespec="seconds"), **record}, ensure_ascii=False)
        try:
            with self._lock():
                _append(path, sound_text(line).encode() + b"\n")
        except OSError as error:
            self.lose(f"{path}: {error.strerror or type(error).__name__}")
            return False
        return True

    def lose(self, why: str) -> None:
        """Count and log a record that isn't written."""
        with self._counting:
            self.lost += 1
            lost = self.lost
        logger.error("%s; a record is lost, %d since the start", why, lost)

    def drop_old(self) -> None:
        """Delete files whose time is over, unless the clock was set since the last look: then the next look does."""
        before, self._clock_offset = self._clock_offset, _clock_offset()
        was_set = abs(self._clock_offset - before) > STEADY_SECONDS
        with self._lock():
            for path, days in self._files():
                if days <= self.keep_days:
                    with path.open("rb+") as file:
                        if _cut_half_line(file, path) == 0:
                            path.unlink()
                elif was_set:
                    logger.warning("the clock was set; whether %s is too old is seen at the next look", path)
                else:
                    path.unlink(missing_ok=True)

    async def tidy(self) -> None:
        """`drop_old` in a thread; a folder that it can't be done in is logged."""
        try:
            await asyncio.to_thread(self.drop_old)
        except OSError as error:
            logger.error("%s: old files can't be deleted (%s)", self.folder, error)

    def _files(self) -> Iterator[tuple[Path, float]]:
        """Each file with the days since the end of its day."""
        for path in self.folder.glob("????-??-??.jsonl"):
            with contextlib.suppress(ValueError):  # no date, so none of ours
                end = datetime.strptime(path.stem, "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=1)
                yield path, (datetime.now(UTC) - end) / timedelta(days=1)

    def _lock(self):
        from filelock import FileLock

        return FileLock(self.folder / ".lock", timeout=LOCK_SECONDS, mode=0o600)


def tidied(*logs: DailyLog | None, seconds: float = TIDY_SECONDS) -> contextlib.AbstractAsyncContextManager[None]:
    """As long as the block lasts, the logs that there are have their old files deleted."""
    return repeating(seconds, *(log.tidy for log in logs if log is not None))


def _append(path: Path, line: bytes) -> None:
    """Add a line, all of it or nothing."""
    path.touch(0o600)
    with path.open("rb+", buffering=0) as file:
        end = _cut_half_line(file, path)
        try:
            write_whole(file, line)
        except OSError:
            file.truncate(end)
            if end == 0:
                path.unlink()
            raise


def _cut_half_line(file: BinaryIO, path: Path) -> int:
    """Go to the end of the last whole line, remove what stands after it, and return where that is."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            end = start + place + 1
            break
        end = start
    if end < size:
        logger.warning("%s: %d bytes of a record that was cut short are removed", path, size - end)
        file.truncate(end)
    return file.seek(end)


def _clock_offset() -> float:
    return time.time() - time.monotonic()  # noqa: TID251
