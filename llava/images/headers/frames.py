"""How many frames a file of Pillow's kinds holds, counted by its own parts: a decoder would read each of them whole."""

import struct

from llava.images.headers.containers import MAX_PARTS
from llava.images.headers.tags import Directory

MOST_FRAMES = 1000
"""Frames are counted so far; of files with more it's only said that there are more."""
_MAX_GIF_BLOCKS = 4_000_000
"""A gigabyte in blocks of 255 bytes, or a second."""


def count_frames(kind: str, content: bytes) -> int:
    """At least 1; `MOST_FRAMES` + 1 for any number beyond; of a damaged file those in front of the damage.

    Args:
        kind: as `containers.read_container` has told.
    """
    counted = {"GIF": _in_gif, "TIFF": _in_tiff, "WEBP": _in_webp, "PNG": _in_png}.get(kind)
    return 1 if counted is None else min(max(1, counted(content)), MOST_FRAMES + 1)


def _in_gif(content: bytes) -> int:
    """Image blocks."""
    frames, size = 0, len(content)
    place = 13 + _colours(content[10])
    in_data = False
    for _ in range(_MAX_GIF_BLOCKS):
        if place >= size or frames > MOST_FRAMES:
            break
        first = content[place]
        if in_data:
            in_data = first > 0
            place += 1 + first
        elif first == 0x21:  # an extension: its label, then data
            place, in_data = place + 2, True
        elif first == 0x2C and place + 10 < size:
            frames += 1
            place, in_data = place + 11 + _colours(content[place + 9]), True
        else:
            break
    return frames


def _colours(flags: int) -> int:
    """Bytes of a GIF's colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _in_tiff(content: bytes) -> int:
    """Directories in a row."""
    starts: set[int] = set()
    try:
        directory: Directory | None = Directory(content)
        while directory is not None and directory.start not in starts and len(starts) <= MOST_FRAMES:
            starts.add(directory.start)
            directory = directory.next()
    except (struct.error, IndexError):
        pass
    return len(starts)


def _in_webp(content: bytes) -> int:
    place, frames = 12, 0
    for _ in range(MAX_PARTS):
        if place + 8 > len(content) or frames > MOST_FRAMES:
            break
        kind, length = struct.unpack_from("<4sL", content, place)
        frames += kind == b"ANMF"
        place += 8 + length + length % 2
    return frames


def _in_png(content: bytes) -> int:
    """What the animation's header says, and one more for an image that is no part of the animation."""
    place, said = 8, 0
    for _ in range(MAX_PARTS):
        if place + 12 > len(content):
            break
        length, kind = struct.unpack_from(">L4s", content, place)
        if kind == b"acTL":
            (said,) = struct.unpack_from(">L", content, place + 8)
        elif kind == b"fcTL" and said:
            return said
        elif kind == b"IDAT":
            return said + 1
        place += 12 + length
    return said
