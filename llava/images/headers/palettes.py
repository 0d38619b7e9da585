"""DICOM's segmented palettes (PS3.3 C.7.9.2), walked before they are expanded: a few bytes may ask for gigabytes."""

import struct

from llava.errors import ImageError

_COLOURS = "Red", "Green", "Blue", "Alpha"
_MAX_INDIRECT = 256
_DISCRETE, _LINEAR, _INDIRECT = 0, 1, 2


def check_palettes(header, name: str) -> None:
    """Raises ImageError: a palette that grows beyond the entries that its descriptor states, or isn't one."""
    descriptor = header.get("RedPaletteColorLookupTableDescriptor")
    for colour in _COLOURS:
        data = header.get(f"Segmented{colour}PaletteColorLookupTableData")
        if not data:
            continue
        try:
            most, width = int(descriptor[0]) or 65_536, int(descriptor[2])
            values = _values(data, width, header.original_encoding[1])
            size = _expanded(values, width == 8)
        except (struct.error, IndexError, TypeError, ValueError):
            raise ImageError(f"{name}: the DICOM header is damaged (a palette in segments)") from None
        if size > min(most, 65_536):
            raise ImageError(f"{name}: the DICOM header is damaged (a palette of more than {most:,} entries)")


def _values(data: bytes, width: int, is_little: bool) -> tuple[int, ...]:
    if width not in (8, 16):
        raise ValueError
    return struct.unpack(f"{'<' if is_little else '>'}{len(data) * 8 // width}{'B' if width == 8 else 'H'}", data)


def _expanded(values: tuple[int, ...], is_bytes: bool) -> int:
    """Entries, as pydicom would make of it; segments that repeat others name none of their own kind."""
    place, size, indirect = 0, 0, 0
    while place + 1 < len(values):
        if values[place] == _INDIRECT:
            segments, offset = values[place + 1], values[place + 2 : place + (6 if is_bytes else 4)]
            # The words are in the order of the file in pydicom too; which bytes are in them is its own matter.
            starts = _starts(offset, is_bytes)
            size += max(_repeated(values, start, segments) for start in starts)
            place += 6 if is_bytes else 4
            indirect += 1
            if indirect > _MAX_INDIRECT:
                raise ValueError
        else:
            length, place = _plain(values, place)
            size += length
        if size > 65_536:
            break
    return size


def _starts(offset: tuple[int, ...], is_bytes: bool) -> tuple[int, ...]:
    if not is_bytes:
        return (offset[1] << 16 | offset[0],)
    low, below, above, high = offset
    return high << 24 | above << 16 | below << 8 | low, above << 24 | high << 16 | low << 8 | below


def _repeated(values: tuple[int, ...], place: int, segments: int) -> int:
    """0 segments are all to the end."""
    size = done = 0
    while place + 1 < len(values):
        length, place = _plain(values, place)
        size, done = size + length, done + 1
        if done == segments or size > 65_536:
            break
    return size


def _plain(values: tuple[int, ...], place: int) -> tuple[int, int]:
    """(entries, where the next one begins) of a segment that repeats no other."""
    code, length = values[place], values[place + 1]
    if code not in (_DISCRETE, _LINEAR) or not length:  # of no entries there could be any number
        raise ValueError
    return length, place + 2 + (length if code == _DISCRETE else 1)
