"""A look through a GGUF file's header before the library reads it, which goes on past the end of a file."""

import mmap
import struct
from pathlib import Path

from gguf import GGUFReader, GGUFValueType

from llava.errors import LlavaError

MOST_ELEMENTS = 2_000_000
"""Of all arrays together: several times a vocabulary with its merges. The library makes two objects of each."""
MOST_ENTRIES = 100_000
"""Fields, and tensors."""
MOST_DIMENSIONS = 8

_MAGIC = b"GGUF"
_SIZES = {kind.value: dtype(0).itemsize for kind, dtype in GGUFReader.gguf_scalar_to_np.items()}


def check_header(path: Path) -> None:
    """Look whether all that the header counts is in the file, and is no more than the library can hold.

    Raises:
        LlavaError: no GGUF file, one that is cut off, or one with more than the caps above.
    """
    if not path.is_file():
        raise LlavaError(f"{path}: no such file")
    if not path.stat().st_size:
        raise LlavaError(f"{path}: no GGUF file that can be read (it is empty)")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _Header(path, content).check()


class _Header:
    def __init__(self, path: Path, content: mmap.mmap):
        self.path, self.content = path, content
        self.place, self.order, self.elements = 0, "<", 0

    def check(self) -> None:
        if self.content[:4] != _MAGIC:
            raise self._fault("it doesn't begin as one does")
        self._skip(4)
        # Of the other byte order, the version's low half is 0.
        if not struct.unpack_from("<L", self.content, self._skip(4))[0] & 0xFFFF:
            self.order = ">"
        tensors, fields = self._number("Q"), self._number("Q")
        self._at_most(fields, MOST_ENTRIES, "fields")
        self._at_most(tensors, MOST_ENTRIES, "tensors")
        for _ in range(fields):
            self._text()
            self._value(self._number("L"))
        for _ in range(tensors):
            self._text()
            dimensions = self._number("L")
            self._at_most(dimensions, MOST_DIMENSIONS, "dimensions of a tensor")
            self._skip(8 * dimensions + 4 + 8)  # sizes, type, place

    def _value(self, kind: int) -> None:
        if kind == GGUFValueType.STRING:
            self._text()
        elif kind == GGUFValueType.ARRAY:
            self._array(self._number("L"), self._number("Q"))
        else:
            self._skip(self._size(kind))

    def _array(self, kind: int, count: int) -> None:
        if kind == GGUFValueType.ARRAY:
            raise self._fault("it holds lists of lists")
        self.elements += count
        self._at_most(self.elements, MOST_ELEMENTS, "list entries")
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                self._text()
        else:
            self._skip(count * self._size(kind))

    def _text(self) -> None:
        self._skip(self._number("Q"))

    def _number(self, form: str) -> int:
        form = self.order + form
        return struct.unpack_from(form, self.content, self._skip(struct.calcsize(form)))[0]

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise self._fault(f"it holds a value of the unknown type {kind}")
        return _SIZES[kind]

    def _skip(self, count: int) -> int:
        """Go on by `count` bytes, which have to be there; where they begin."""
        place = self.place
        if count > len(self.content) - place:
            raise self._fault(f"it is cut off, {count} bytes should follow at {place} of {len(self.content)}")
        self.place += count
        return place

    def _at_most(self, count: int, most: int, words: str) -> None:
        if count > most:
            raise self._fault(f"it has {count} {words}; at most {most} are read")

    def _fault(self, words: str) -> LlavaError:
        return LlavaError(f"{self.path}: no GGUF file that can be read ({words})")
