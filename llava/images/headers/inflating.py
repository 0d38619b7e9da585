"""Compressed data unpacked in pieces, so that what it grows to is known before it is there."""

import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from llava.errors import ImageError, LlavaError

GZIP = b"\x1f\x8b"
_PIECE = 16 << 10
"""Bytes unpacked at once; deflate makes at most 1032 times as many of them."""
_MAX_MEMBERS = 100_000
"""A gigabyte in the blocks of bgzip, the smallest members in use, makes 16,000."""


def gunzip(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Pieces of all members of a gzip file, one after the other; what follows the last member is left out.

    Raises:
        ImageError: damaged, cut off, or in very many members.
    """
    piece = file.read(_PIECE)
    for _ in range(_MAX_MEMBERS):
        unpacker = zlib.decompressobj(wbits=31)
        while not unpacker.eof:
            if not piece:
                raise ImageError(f"{name}: the compressed data is cut off")
            try:
                unpacked = unpacker.decompress(piece)
            except zlib.error:
                raise ImageError(f"{name}: the compressed data is damaged, or no gzip") from None
            if unpacked:
                yield unpacked
            piece = unpacker.unused_data if unpacker.eof else file.read(_PIECE)
        piece = piece or file.read(_PIECE)
        if piece[:1] != GZIP[:1]:
            return
    raise ImageError(f"{name}: compressed in more than {_MAX_MEMBERS:,} parts")


class NoRoom(LlavaError):
    """The disk has no room for what is unpacked: not a fault of the image."""


class Unpacked:
    """A gzip file to be read at any place: unpacked once, as far as anyone has read, into a file that has no name."""

    def __init__(self, file: BinaryIO, name: str):
        self._pieces, self._name = gunzip(file, name), name
        self._store = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._place = self._end = 0
        self._failed: LlavaError | None = None

    def seek(self, place: int) -> None:
        self._place = place

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end.

        Raises:
            ImageError: the data is damaged before this place.
            NoRoom: to unpack it.
        """
        self._unpack(self._place + size)
        self._store.seek(self._place)
        part = self._store.read(size)
        self._place += len(part)
        return part

    def close(self) -> None:
        self._store.close()

    def _unpack(self, end: int) -> None:
        self._store.seek(self._end)
        while self._end < end:
            if self._failed is not None:
                raise self._failed
            try:
                piece = next(self._pieces, b"")
                self._end += self._write(piece)
            except LlavaError as error:
                self._failed = error  # what was half written stands where the next piece belongs
                raise
            if not piece:
                return

    def _write(self, piece: bytes) -> int:
        try:
            written = self._store.write(piece)
            self._store.flush()
        except OSError as error:
            raise NoRoom(
                f"{self._name}: no room to unpack it in {tempfile.gettempdir()} ({error.strerror}); "
                f"free some space, or set TMPDIR to another folder"
            ) from error
        return written


def inflate(content: bytes | memoryview, max_bytes: int, name: str) -> bytes | None:
    """Raw deflate data unpacked (a deflated DICOM data set); None for more than `max_bytes`.

    Raises:
        ImageError: damaged or cut off.
    """
    unpacker, pieces, size = zlib.decompressobj(wbits=-zlib.MAX_WBITS), [], 0
    try:
        for start in range(0, len(content), _PIECE):
            pieces.append(unpacker.decompress(content[start : start + _PIECE]))
            size += len(pieces[-1])
            if size > max_bytes:
                return None
            if unpacker.eof:
                break
    except zlib.error:
        raise ImageError(f"{name}: the compressed data is damaged") from None
    if not unpacker.eof:
        raise ImageError(f"{name}: the compressed data is cut off")
    return b"".join(pieces)
