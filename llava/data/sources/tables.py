"""Tables of text, CSV and TSV, row by row, with errors that name file and line."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava.errors import LlavaError
from llava.folders import check_file
from llava.lines import bounded_lines, not_utf8

_LONGEST_CELL = 1 << 24
_MOST_BYTES = 256 << 20
"""Of a file that is read whole."""


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends (`\\n` or `\\r\\n`; others, such as U+2028, are part of a line).

    Raises:
        LlavaError: the file isn't UTF-8, has more than 256 MiB, or is none.
    """
    check_file(path)
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise LlavaError(f"{path}: {size:,} bytes; at most {_MOST_BYTES:,} of such a file are read")
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error


def read_table(
    path: Path, columns: Sequence[str], delimiter: str | None = None, hint: str | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of each row that isn't blank; every row has every column of the table's first line.

    Args:
        columns: those that have to be there.
        delimiter: between cells; default: a tab for .tsv and .tab, else a comma.
        hint: what to do about a column that isn't there.

    Raises:
        LlavaError: the file isn't UTF-8 or not a table, lacks a column, or a row has another number of cells.
    """
    delimiter = delimiter or ("\t" if path.suffix.lower() in (".tsv", ".tab") else ",")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise LlavaError(
            f"--delimiter {delimiter!r}: give one character; a tab is the default of .tsv, or $'\\t' in a shell"
        )
    check_file(path)
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(bounded_lines(file, path), delimiter=delimiter, strict=True)
        try:
            there = reader.fieldnames or []
            absent = [name for name in columns if name not in there]
            if absent:
                what_to_do = f" ({hint})" if hint else ""
                raise LlavaError(f"{path}: no column {', '.join(absent)}; there are: {', '.join(there)}{what_to_do}")
            if doubled := [name for name in columns if there.count(name) > 1]:
                raise LlavaError(
                    f"{path}: {there.count(doubled[0])} columns are called {doubled[0]}; rename all but one"
                )
            for row in reader:
                if None in row or None in row.values():
                    line = f"{path} line {reader.line_num}"
                    raise LlavaError(f"{line}: {len(there)} columns expected; is a quote missing?")
                yield reader.line_num, row
        except csv.Error as error:
            raise LlavaError(f"{path} line {reader.line_num}: not a readable table ({error})") from error
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from error
