"""Files of records: JSON lists, JSONL and Parquet, read by content and written whole or not at all.

`iter_records` reads any of the three, `write_records` writes by suffix, and `atomic_path` makes a file appear under its
name only when it is complete.

Half of a character pair (a lone surrogate, which JSON can hold and UTF-8 can't) becomes U+FFFD wherever text is read or
written; how many is logged. In a record NaN is null: pandas writes it for an empty cell.
"""

import codecs
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any

from llava.errors import LlavaError, amount, first_line, library_errors
from llava.folders import PART, check_file, open_to_others, refuse_other_content, sync, writing
from llava.lines import MOST_LINE, bounded_lines, not_utf8
from llava.parquet import iter_parquet

Record = dict[str, Any]

logger = logging.getLogger(__name__)

_WINDOW = 1 << 20
"""Characters of a JSON list that are looked at together; a longer record widens it."""
MOST_JSON = 2 << 30  # bytes of a file that is read whole; lists of records are streamed
_NOT_JSON = (ValueError, RecursionError)  # the second for brackets in brackets in brackets
_BLANKS = (" ", "\n", "\r", "\t")
_SUFFIXES = (".json", ".jsonl", ".parquet")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder()
_RECORD_DECODER = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
_ESCAPE = r"\\u[dD][89a-fA-F]"  # of half of a pair, which may have its other half next to it
_ESCAPE_IN_TEXT, _ESCAPE_IN_BYTES = re.compile(_ESCAPE), re.compile(_ESCAPE.encode())


def iter_records(path: str | Path) -> Iterator[Record]:
    """Records of a JSON list, a JSONL or a Parquet file (told apart by their first bytes).

    All three are streamed: memory doesn't grow with the number of records.

    Raises:
        LlavaError: the file is missing, empty, not one of the three, or holds something that isn't an object;
            the message names file and line (or record).
    """
    path = Path(path)
    check_file(path)
    head = first_bytes(path)
    if head[:4] == b"PAR1":
        yield from _iter_parquet(path)
    elif head[:1] == b"[":
        yield from _iter_json(path)
    elif not head:
        raise LlavaError(f"{path}: the file is empty")
    else:
        for _, record in iter_jsonl(path):
            yield record


def first_bytes(path: Path) -> bytes:
    """Some bytes of a file from the first one that is no blank and no mark of UTF-8; none if there is no other."""
    with path.open("rb") as file:
        head = file.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()
        while not head and (more := file.read(1 << 16)):
            head = more.lstrip()
    return head


def read_records(path: str | Path) -> list[Record]:
    """`iter_records` as a list."""
    return list(iter_records(path))


def iter_jsonl(path: str | Path) -> Iterator[tuple[int, Record]]:
    """(line number from 1, object) of each line that isn't blank; errors name file and line."""
    path, replaced = Path(path), Replaced(path)
    check_file(path)
    with path.open("rb") as file, replaced:
        for number, line in enumerate(bounded_lines(file, path), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.isspace():
                yield number, parse_record(line, replaced, "line", number)


def read_json(path: str | Path, decoder: json.JSONDecoder = _DECODER) -> Any:
    """The content of a JSON file of at most `MOST_JSON` bytes; errors name the file."""
    path = Path(path)
    check_file(path)
    if (size := path.stat().st_size) > MOST_JSON:
        raise LlavaError(f"{path}: {size} bytes; at most {MOST_JSON} of JSON are read whole")
    try:
        content = path.read_bytes()
        may_hold = _ESCAPE_IN_BYTES.search(content) is not None
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text, may_hold = content.decode("utf-8", "surrogatepass").removeprefix("\ufeff"), True
        value = decoder.decode(text)
        if not may_hold:
            return value
        with Replaced(path) as replaced:
            return replaced.mend(value)
    except _NOT_JSON as error:
        raise _not_json(path, error) from error


def write_json(path: str | Path, content: Any, indent: int | None = 2, *, overwrite: bool = True) -> None:
    """Write JSON as `atomic_path` does, keys in the order given, non-ASCII text as it is."""
    with atomic_path(path, overwrite=overwrite) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json_text(content, path, indent) + "\n")


def write_records(path: str | Path, records: Iterable[Record], *, overwrite: bool = True) -> int:
    """Write records as `atomic_path` does; the suffix says the form (.json, .jsonl, .parquet). Returns how many."""
    path = Path(path)
    check_suffix(path)
    writers = {".json": _write_json_list, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    with atomic_path(path, overwrite=overwrite) as temporary:
        return writers[path.suffix](temporary, records, path)


def check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise LlavaError(f"{path}: unknown kind of record file; use one of {', '.join(_SUFFIXES)}")


class Replaced:
    """Counts the texts of a file that held half of a character pair; as a context it says so at its end."""

    def __init__(self, path: str | Path):
        self.path, self.count, self.first = path, 0, ""

    def mend(self, value: Any, place: str = "") -> Any:
        """`sound_text` of every text in a JSON value, counted; `place` is where in the file the value is."""
        if isinstance(value, str):
            sound = sound_text(value)
            if sound != value:
                self.count += 1
                self.first = self.first or place
            return sound
        if isinstance(value, dict):
            return {self.mend(key, place): self.mend(item, place) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mend(item, place) for item in value]
        return value

    def __enter__(self) -> "Replaced":
        return self

    def __exit__(self, *_: object) -> None:
        if self.count:
            first = f" (first: {self.first})" if self.first else ""
            texts = amount(self.count, "text")
            logger.warning("%s: %s held half of a character pair%s, replaced by U+FFFD", self.path, texts, first)


def parse_record(line: bytes, replaced: Replaced, unit: str, number: int) -> Record:
    """The object that a line of JSON holds; `unit` and `number` say where it is in its file ("line", 3).

    Raises:
        LlavaError: it isn't JSON, or not an object; the message names the file and the place.
    """
    may_hold = _ESCAPE_IN_BYTES.search(line) is not None
    try:
        try:
            # Given bytes, json would try each line for other encodings, which takes as long as reading it.
            text = line.decode()
        except UnicodeDecodeError:
            text, may_hold = line.decode("utf-8", "surrogatepass"), True
        record = _RECORD_DECODER.decode(text)
        record = replaced.mend(record, f"{unit} {number}") if may_hold else record
    except _NOT_JSON as error:
        raise _not_json(f"{replaced.path} {unit} {number}", error) from error
    if not isinstance(record, dict):
        raise LlavaError(f"{replaced.path} {unit} {number}: expected an object, got {type(record).__name__}")
    return record


def _not_json(where: str | Path, error: Exception) -> LlavaError:
    if isinstance(error, UnicodeDecodeError):
        return not_utf8(where, error)
    return LlavaError(f"{where}: not JSON ({error})")


def sound_text(text: str) -> str:
    """Text that UTF-8 can hold: halves of a pair that stand together are joined, a lone one becomes U+FFFD."""
    if text.isascii() or _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_text(content: Any, path: str | Path, indent: int | None = None) -> str:
    """`content` as JSON; `path`, for messages, is where it goes.

    Raises:
        LlavaError: it holds what JSON has no form for.
    """
    try:
        text = json.dumps(content, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:  # bytes, a date; lists in lists in lists
        raise LlavaError(
            f"{path}: JSON can't hold it ({first_line(error)}); embedded images and dates go into .parquet"
        ) from error
    sound = sound_text(text)
    if sound != text:
        logger.warning("%s: half of a character pair in what is written, replaced by U+FFFD", path)
    return sound


@contextmanager
def atomic_path(path: str | Path, *, overwrite: bool = True, private: bool = False) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes if it fails.

    Args:
        overwrite: replace a file of other content; the same content again is never refused.
        private: only its user may read it (mode 0600).

    Raises:
        LlavaError: the system refuses to write it, or other content is there that may not be replaced.
    """
    path = Path(path)
    with writing(path):
        yield from _atomic_path(path, overwrite, private)


def _atomic_path(path: Path, overwrite: bool, private: bool) -> Iterator[Path]:
    if path.is_dir():
        raise LlavaError(f"{path}: is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if not overwrite:
            refuse_other_content(temporary, path)
        sync(temporary)
        if not private:
            open_to_others(temporary)  # mkstemp makes private files
        if (others := _together.get()) is None:
            temporary.replace(path)
        else:
            others[temporary] = path
    finally:
        if temporary not in (_together.get() or ()):
            temporary.unlink(missing_ok=True)


_together: ContextVar[dict[Path, Path] | None] = ContextVar("together", default=None)
"""Files of `written_together` that are complete, and the names that they will have."""


@contextmanager
def written_together() -> Iterator[None]:
    """What `atomic_path` writes in the block, in its thread, gets its names at the block's end; if it fails, none does.

    For the outputs of one command: where one of them may not be replaced, none is written.
    """
    files: dict[Path, Path] = {}
    outer = _together.set(files)
    try:
        yield
        for temporary, path in files.items():
            with writing(path):
                temporary.replace(path)
    finally:
        _together.reset(outer)
        for temporary in files:
            temporary.unlink(missing_ok=True)


def _iter_json(path: Path) -> Iterator[Record]:
    """The objects of a JSON list, parsed one by one out of a window of the file."""
    decode = _RECORD_DECODER.raw_decode
    text, place, index = "", 0, 0
    with path.open(encoding="utf-8-sig") as file, Replaced(path) as replaced:
        try:
            while not text.strip():
                text = file.read(_WINDOW)
            place = _skip_blanks(text, 0) + 1  # after the "["
            while True:
                if len(text) - place < _WINDOW // 4 and (more := file.read(_WINDOW)):
                    text, place = text[place:] + more, 0
                place = _skip_blanks(text, place)
                if text[place : place + 1] == "]":
                    if text[place + 1 :].strip() or file.read().strip():
                        raise ValueError("there is something after the list")
                    return
                if index:
                    if text[place : place + 1] != ",":
                        raise ValueError("expected a comma or the end of the list")
                    place = _skip_blanks(text, place + 1)
                while True:
                    if len(text) - place > MOST_LINE + _WINDOW:
                        raise ValueError(f"it is longer than {MOST_LINE >> 20} MiB")
                    try:
                        record, end = decode(text, place)
                        if end < len(text):
                            break
                    except json.JSONDecodeError as error:
                        # Only an error that the rest of the file may heal is worth reading on for.
                        unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16
                        if not unfinished or not (more := file.read(max(_WINDOW, len(text)))):
                            raise
                    else:
                        # What ends with the window may go on after it (a number), or the file be cut here.
                        if not (more := file.read(_WINDOW)):
                            raise ValueError("the list is cut off")
                    text, place = text[place:] + more, 0
                if not isinstance(record, dict):
                    raise LlavaError(f"{path} record {index}: expected an object, got {type(record).__name__}")
                if _ESCAPE_IN_TEXT.search(text, place, end):
                    record = replaced.mend(record, f"record {index}")
                yield record
                place, index = end, index + 1
        except UnicodeDecodeError:
            # Halves of pairs written out, perhaps; so rare that such a file may be read whole.
            yield from islice(read_json_list(path), index, None)
        except _NOT_JSON as error:
            raise _not_json(f"{path} record {index}", error) from error


def read_json_list(path: Path) -> list[Record]:
    """The objects of a JSON list, read whole; errors name the file and the record."""
    records: list[Record] = read_json(path, _RECORD_DECODER)
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise LlavaError(f"{path} record {index}: expected an object, got {type(record).__name__}")
    return records


def _skip_blanks(text: str, place: int) -> int:
    while text[place : place + 1] in _BLANKS and place < len(text):
        place += 1
    return place


def _iter_parquet(path: Path) -> Iterator[Record]:
    for part in iter_parquet(path):
        with library_errors(f"{path}: not a whole Parquet file"):
            rows = part.to_pylist()
        yield from map(without_nulls, rows)


def without_nulls(row: Record) -> Record:
    """A row of a table as a record: what that doesn't have is null in its column, or NaN."""
    return {name: value for name, value in row.items() if value is not None and value == value}


def _write_json_list(path: Path, records: Iterable[Record], name: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, record in enumerate(records, 1):
            file.write("[\n" if count == 1 else ",\n")
            file.write(json_text(record, name))
        file.write("\n]\n" if count else "[]\n")
    return count


def _write_jsonl(path: Path, records: Iterable[Record], name: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json_text(record, name) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, records: Iterable[Record], name: Path) -> int:
    import pyarrow
    import pyarrow.parquet as parquet

    with Replaced(name) as replaced:
        rows = [replaced.mend(record) for record in records]
    columns = {}
    # Of all records, not of the first, as pyarrow would take them: that one may have no image.
    for column in dict.fromkeys(key for row in rows for key in row):
        try:
            columns[column] = pyarrow.array([row.get(column) for row in rows])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise LlavaError(f"{column!r} can't be a column of Parquet ({error}); write .jsonl instead") from error
    try:
        parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowNotImplementedError as error:  # {} alone; it names the column
        raise LlavaError(f"{name}: Parquet can't hold a record ({error}); write .jsonl instead") from error
    return len(rows)
