"""JSONL files that are collected record by record: a killed run loses at most the line that it was writing."""

import json
from collections.abc import Iterable
from io import RawIOBase
from pathlib import Path
from typing import Any

from llava.errors import LlavaError
from llava.folders import PART, writing
from llava.records import Record, check_suffix, json_text, write_records


def write_whole(file: RawIOBase, content: bytes) -> None:
    """Write all of `content` to a file without a buffer, which may take it in pieces."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


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
            if self.part.exists():
                self._read_part()
            # Without a buffer: what a full disk refused must not be tried again while the file is closed.
            self._file = self.part.open("ab", buffering=0)

    def add(self, record: Record) -> None:
        key = record[self.key]
        if key in self.done:
            raise LlavaError(f"{self.part}: {self.key} {key!r} was written twice")
        line = json_text(record, self.path).encode() + b"\n"
        with writing(self.part, f"{len(self.done)} records are kept"):
            write_whole(self._file, line)
        self.done[key] = record

    def finish(self, order: Iterable[Any] | None = None, *, keep_part: bool = False) -> None:
        """Write all records (in `order` of keys, default: as added) to the final name.

        `keep_part`: the part file stays until `llava.manifests.write_manifest` says that the file is complete.
        """
        keys = list(self.done) if order is None else list(order)
        missing = [key for key in keys if key not in self.done]
        if missing:
            raise LlavaError(f"{self.part}: {len(missing)} records are missing, first {self.key} {missing[0]!r}")
        write_records(self.path, (self.done[key] for key in keys))
        self.close()
        if not keep_part:
            self.part.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "ResumableJsonl":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_part(self) -> None:
        end = 0
        with self.part.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the line that was being written when the run was killed
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                self.done[record[self.key]] = record
                end += len(line)
        with self.part.open("rb+") as file:
            file.truncate(end)
