"""The lines of a text file of others: a compressed archive of a few kilobytes may hold one of 100 GB."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, AnyStr

from llava.errors import LlavaError

MOST_LINE = 64 << 20
"""Bytes or characters. What JSON makes of them takes up to 28 times as much memory."""


def not_utf8(where: str | Path, error: UnicodeDecodeError) -> LlavaError:
    """The error of a file of text that is something else."""
    is_packed = error.object[:2] in (b"\x1f\x8b", b"PK")  # gzip; zip, as spreadsheets are
    what_to_do = "unpack it, or save a spreadsheet as CSV in UTF-8" if is_packed else "save the file as UTF-8"
    return LlavaError(f"{where}: not UTF-8 ({error}); {what_to_do}")


def bounded_lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines with their ends.

    Raises:
        LlavaError: one is longer than `MOST_LINE`.
    """
    number = 0
    while line := file.readline(MOST_LINE + 1):
        number += 1
        if len(line) > MOST_LINE:
            raise LlavaError(f"{path} line {number}: longer than {MOST_LINE >> 20} MiB, which isn't read; is it text?")
        yield line
