"""TIFF's directories of tags, in TIFF files and in EXIF data: sizes without values, and the orientation."""

import mmap
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of one value, by the type's number (TIFF 6.0 section 2, and BigTIFF's)."""
_INTEGERS = {1: "B", 3: "H", 4: "L", 13: "L", 16: "Q"}
_ORIENTATION = 274
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


@dataclass(frozen=True)
class Tag:
    """The entry of a directory at `place` of the data: `size` bytes in `count` values, which begin at `offset`."""

    number: int
    kind: int
    count: int
    size: int
    offset: int
    place: int


class Directory:
    """A directory of TIFF or EXIF data, by default the first. Nothing but its entries is read; struct.error where it's
    cut off."""

    def __init__(self, data: bytes | memoryview | mmap.mmap, start: int | None = None):
        self.data = data
        self.order = "<" if bytes(data[:2]) == b"II" else ">"
        self.is_big = 43 in (data[2], data[3])
        if start is None:
            (start,) = self._unpack("Q" if self.is_big else "L", 8 if self.is_big else 4)
        self.start = start
        (self.count,) = self._unpack("Q" if self.is_big else "H", start)
        self._first = start + (8 if self.is_big else 2)

    def __iter__(self) -> Iterator[Tag]:
        layout, step, inline = ("HHQ", 20, 8) if self.is_big else ("HHL", 12, 4)
        for place in range(self._first, self._first + step * self.count, step):
            number, kind, count = self._unpack(layout, place)
            size = count * _SIZES.get(kind, 0)
            value = place + step - inline
            offset = value if size <= inline else self._unpack("Q" if self.is_big else "L", value)[0]
            yield Tag(number, kind, count, size, offset, place)

    def next(self, is_wide: bool = False) -> "Directory | None":
        """The directory after this one, whose place has 64 bits in BigTIFF or where `is_wide`; None after the last."""
        end = self._first + (20 if self.is_big else 12) * self.count
        (start,) = self._unpack("Q" if self.is_big or is_wide else "L", end)
        return Directory(self.data, start) if start else None

    def integer(self, tag: Tag) -> int:
        """Its first value; 0 for one that is no whole number."""
        layout = _INTEGERS.get(tag.kind)
        return self._unpack(layout, tag.offset)[0] if layout and tag.count else 0

    def integers(self, tag: Tag) -> tuple[int, ...]:
        """All its values, if they are whole numbers."""
        layout = _INTEGERS.get(tag.kind)
        return self._unpack(f"{tag.count}{layout}", tag.offset) if layout else ()

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        if offset > sys.maxsize:  # unpack_from would raise an OverflowError
            raise struct.error("beyond the data")
        return struct.unpack_from(self.order + layout, self.data, offset)


def exif_orientation(exif: bytes | memoryview) -> int:
    """1 to 8 as EXIF counts; 1 (upright) where it isn't told, or the data is broken."""
    while bytes(exif[:6]) == b"Exif\0\0":
        exif = exif[6:]
    try:
        directory = Directory(exif)
        for place, tag in enumerate(directory):
            if tag.number == _ORIENTATION:
                value = directory.integer(tag)
                return value if 1 <= value <= 8 else 1
            if place > 1000:
                break
    except (struct.error, IndexError):
        pass
    return 1


def xmp_orientation(xmp: bytes | memoryview) -> int:
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 1
