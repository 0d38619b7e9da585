"""JSONL files that are collected record by record: a killed run loses at most the line that it was writing."""

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from io import BufferedReader, FileIO, RawIOBase
from pathlib import Path
from typing import Any

from llava.errors import LlavaError, amount
from llava.folders import PART, writing
from llava.records import Record, check_suffix, json_text, write_records


def write_whole(file: RawIOBase, content: bytes) -> None:
    """Write all of `content` to a file without a buffer, which may take it in pieces."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def open_part(path: Path) -> FileIO:
    """An unfinished file, to be read (`read_lines`) and appended to by this process alone until it is closed.

    It has no buffer: what a full disk refused must not be tried again while it is closed. No other handle of it may be
    closed meanwhile, which would let other processes in.

    Raises:
        LlavaError: another process has it.
    """
    while True:
        file = FileIO(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise LlavaError(f"{path}: another process is writing it; wait for it or give another name") from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # another process has just finished it


def read_lines(file: FileIO) -> Iterator[bytes]:
    """The lines of a file of `open_part`, from its beginning."""
    file.seek(0)
    reader = BufferedReader(file)
    try:
        while line := reader.readline():
            yield line
    finally:
        reader.detach()


class ResumableJsonl:
    """A JSONL file that is collected line by line in `<path>.part` and renamed when complete.

    `done` maps each finished key to its record, read back from an earlier run (a torn last line is dropped).
    `add` writes and flushes one record; `finish` writes the records in the order asked for, under the final
    name, and removes the part file. A key that is added twice is an error: no answer is lost or doubled.
    """

    def __init__(self, path: str | Path, key: str = "question_id"):
        self.path = Path(path)
        check_suffix(self.path)  # now, not when hours of answers are to get their name
        self.part = self.path.with_name(self.path.name + PART)
        self.key = key
        self.done: dict[Any, Record] = {}
        with writing(self.part):
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_part(self.part)
            self._read_part()

    def add(self, record: Record) -> None:
        key = record[self.key]
        if key in self.done:
            raise LlavaError(f"{self.part}: {self.key} {key!r} was written twice")
        line = json_text(record, self.path).encode() + b"\n"
        with writing(self.part, f"{amount(len(self.done), 'record is', 'records are')} kept"):
            write_whole(self._file, line)
        self.done[key] = record

    def finish(self, order: Iterable[Any] | None = None, *, keep_part: bool = False) -> None:
        """Write all records (in `order` of keys, default: as added) to the final name.

        `keep_part`: the part file stays until `llava.manifests.write_manifest` says that the file is complete.
        """
        keys = list(self.done) if order is None else list(order)
        missing = [key for key in keys if key not in self.done]
        if missing:
            which = amount(len(missing), "record is", "records are")
            raise LlavaError(f"{self.part}: {which} missing, first {self.key} {missing[0]!r}")
        write_records(self.path, (self.done[key] for key in keys))
        if not keep_part:
            self.part.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "ResumableJsonl":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_part(self) -> None:
        end, lines = 0, read_lines(self._file)
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if record is None:
                if next(lines, None) is not None:
                    raise LlavaError(f"{self.part} line {number}: not JSON, and more follows; remove that line")
                break  # the line that was being written when the run was killed
            if not isinstance(record, dict) or self.key not in record:
                raise LlavaError(
                    f"{self.part} line {number}: no {self.key!r}, so another command began it; finish that one, give "
                    f"another name, or remove the file"
                )
            self.done[record[self.key]] = record
            end += len(line)
        self._file.truncate(end)
