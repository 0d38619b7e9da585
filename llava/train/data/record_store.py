"""Records by number: what a random sampler needs, in little memory however many there are.

JSONL is read through an index of line offsets, Arrow by memory map; Parquet, which can't be read by number, is
unpacked into an Arrow file first; a JSON list has to be parsed whole and is then kept as bytes if it is long.
"""

import codecs
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from llava.bars import tqdm
from llava.errors import LlavaError, library_errors, one_line
from llava.folders import expanded
from llava.lines import MOST_LINE
from llava.parquet import iter_parquet, parquet_schema
from llava.records import Record, Replaced, atomic_path, first_bytes, parse_record, read_json_list, without_nulls
from llava.train.data.kept_files import kept_path

logger = logging.getLogger(__name__)

KEEP_PARSED = 20_000
"""Longest JSON list that is kept as Python objects (about 3 kB each); longer ones are kept as bytes."""

_SCAN_BYTES = 1 << 24


class RecordStore(Protocol):
    """A file of records, indexed by number."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_records(path: str | Path, output_dir: str | Path = ".") -> RecordStore:
    """Open a JSON list, JSONL, Parquet or Arrow file for reading by number (told apart by its first bytes).

    What Parquet is unpacked to is kept next to it, or in `output_dir` where that can't be written.

    Raises:
        LlavaError: the file is missing, empty or none of these.
    """
    path = expanded(path)
    if not path.is_file():
        raise LlavaError(f"{path}: no such file")
    head = first_bytes(path)
    if not head:
        raise LlavaError(f"{path}: the file is empty")
    if head[:4] == b"PAR1":
        store: RecordStore = ArrowRecords(path, _unpacked(path, Path(output_dir)))
    elif head[:6] == b"ARROW1":
        store = ArrowRecords(path, path)
    elif head[:1] == b"[":
        store = ListRecords(path)
    else:
        store = JsonlRecords(path)
    if len(store) == 0:
        raise LlavaError(f"{path}: there are no records in it")
    return store


def describe(store: RecordStore, index: int, record: Record | None = None) -> str:
    """Where a record is, for messages: file, number and id."""
    name = f"{store.path} record {index}"
    if record is not None and record.get("id") is not None:
        name += f' ("{one_line(str(record["id"]), 100)}")'
    return name


class JsonlRecords:
    """One JSON object per line, read by offset: 8 bytes of memory per record."""

    def __init__(self, path: Path):
        self.path = path
        self.offsets = _line_offsets(path)
        self._file: tuple[int, int] | None = None
        self._warned = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Record:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        if end - start > MOST_LINE:
            raise LlavaError(f"{self.path} record {index}: longer than {MOST_LINE >> 20} MiB, which isn't read")
        line = os.pread(self._descriptor(), end - start, start)
        replaced = Replaced(self.path)
        record = parse_record(line.removeprefix(codecs.BOM_UTF8).strip(), replaced, "record", index)
        if replaced.count and not self._warned:
            self._warned = True
            logger.warning(
                "%s record %d holds half of a character pair, replaced by U+FFFD; llava.data.validate counts them",
                self.path,
                index,
            )
        return record

    def _descriptor(self) -> int:
        # A forked worker opens the file anew: it must not share its parent's descriptor.
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self.path, os.O_RDONLY))
        return self._file[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def __del__(self):
        if self._file is not None and self._file[0] == os.getpid():
            os.close(self._file[1])


class ListRecords:
    """A JSON list, parsed once; a long one is kept as one block of bytes, a quarter of the memory."""

    def __init__(self, path: Path):
        self.path = path
        records = read_json_list(path)
        self._records = records if len(records) <= KEEP_PARSED else None
        self._length = len(records)
        if self._records is None:
            self._bytes, self._offsets = _as_bytes(records)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if self._records is not None:
            return self._records[index]
        return json.loads(self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes())


class ArrowRecords:
    """An Arrow IPC file, memory-mapped: what isn't being read takes no memory. `path` is what the user gave."""

    def __init__(self, path: Path, arrow: Path):
        import pyarrow

        self.path = path
        self._arrow = arrow
        with library_errors(f"{path}: not a whole Arrow file"):
            self._table = pyarrow.ipc.open_file(pyarrow.memory_map(str(arrow))).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Record:
        with library_errors(f"{self.path} record {index}: can't be read"):
            row = self._table.slice(index, 1).to_pylist()[0]
        return without_nulls(row)

    def __reduce__(self):
        # A worker process maps the file itself; the table would travel with all its rows.
        return ArrowRecords, (self.path, self._arrow)


def _unpacked(path: Path, output_dir: Path) -> Path:
    """The Arrow file with the rows of a Parquet file, written if it isn't there; few rows in memory at a time."""
    import pyarrow
    from filelock import FileLock

    target = kept_path(path, output_dir, "arrow", {})
    target.parent.mkdir(parents=True, exist_ok=True)
    # The first of the processes of a run writes it, the others wait.
    with FileLock(target.with_name(target.name + ".lock")):
        if target.is_file():
            return target
        with (
            atomic_path(target) as temporary,
            pyarrow.OSFile(str(temporary), "wb") as sink,
            pyarrow.ipc.new_file(sink, parquet_schema(path)) as out,
        ):
            for part in tqdm(iter_parquet(path), desc="unpacking records", unit=" parts", delay=2):
                out.write_batch(part)
    return target


def _line_offsets(path: Path) -> np.ndarray:
    """Byte offset of each line's start, and the file's end: int64 [lines + 1]. Blank lines belong to the one before."""
    size = path.stat().st_size
    starts = [np.zeros(1, np.int64)]
    # Starts of lines that begin with a blank: nearly always lines of blanks alone, where no record starts.
    suspects: list[int] = []
    first = last = b"\n"
    with path.open("rb") as file:
        base = 0
        while block := file.read(_SCAN_BYTES):
            data = np.frombuffer(block, np.uint8)
            after = np.flatnonzero(data[:-1] == ord("\n")) + 1
            if last == b"\n" and base:
                after = np.concatenate([[0], after])
            if not base:
                first = block[:1]
            # The usual blank line, "\n" or "\r\n", is told by its first byte.
            after = after[(data[after] != ord("\n")) & (data[after] != ord("\r"))]
            suspects += (after[np.isin(data[after], _BLANK_BYTES)] + base).tolist()
            starts.append(after.astype(np.int64) + base)
            last = block[-1:]
            base += len(block)
        offsets = np.concatenate(starts)
        blank = [start for start in suspects if _is_blank_line(file, start)]
        if first.isspace() and _is_blank_line(file, 0):
            blank.append(0)
    offsets = offsets[~np.isin(offsets, blank)] if blank else offsets
    return np.concatenate([offsets, np.array([size], np.int64)])


_BLANK_BYTES = np.frombuffer(b" \t\v\f", np.uint8)


def _is_blank_line(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    return not file.readline().strip()


def _as_bytes(records: Iterable[Record]) -> tuple[np.ndarray, np.ndarray]:
    block = bytearray()
    offsets = [0]
    for record in records:
        block += json.dumps(record, ensure_ascii=False).encode()
        offsets.append(len(block))
    return np.frombuffer(bytes(block), np.uint8), np.array(offsets, np.int64)
