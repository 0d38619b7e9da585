"""Whole-slide images of pathology: one of their smaller levels as RGB, never the full size (extra "slides": openslide).

Labels and overviews, on which a name may stand, are other images of the same file; they aren't read.
"""

import contextlib
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from llava.errors import ImageError, LlavaError, require
from llava.images.facts import ImageFacts
from llava.images.headers.codestreams import check_jpeg2000
from llava.images.headers.tags import Directory
from llava.images.limits import Limits, plain_errors
from llava.images.modes import to_rgb

SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif")
"""Of what scanners write; a tiled TIFF with smaller copies of itself is known by its content."""
SIDE = 2048
"""Pixels of a thumbnail's longer side."""

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _TILE_WIDTH, _TILE_HEIGHT = _SIZES = (256, 322, 323)
_HEIGHT, _COMPRESSION, _TILE_OFFSETS, _TILE_BYTES = 257, 259, 324, 325
_JPEG2000 = (33_003, 33_004, 33_005, 34_712)
"""Kinds of compression."""
_LEAST_JPEG2000 = 4096
"""Pixels that a tile of JPEG 2000 counts for at least: its decoder is set up for each."""
_MOST_TILE = 4096
_COST, _TILE_PIXEL_COST, _TILE_COST = 1.5, 0.5, 64.0
"""Against a pixel of a plain JPEG: of a pixel that is shown, which has transparency; of one of a tile, all of which are
decoded; of a tile."""
_MAX_DIRECTORIES, _MAX_TAGS = 256, 65_536
_MAX_TAG_BYTES = 256 << 20
"""Of a whole file: libraries read the values of all tags, though many may point at the same ones."""
_MAX_INDEX = 1 << 20
"""Bytes of the index of a slide in several files."""
_NAMES_FILE = re.compile(
    rb"(?im)^[ \t]*(?:FILE_\d+|INDEXFILE|ImageFile[^=\n]*+|MapFile|OptimisationFile|MacroImage)[ \t]*=(.*)$"
)
_NDPI = 65_420
"""A tag of Hamamatsu's, in whose TIFF files places have 64 bits without it being said."""


def is_slide(path: Path, file: BinaryIO, name: str) -> bool:
    """Whether a file is a slide: by its name, or a TIFF in tiles followed by smaller ones of itself.

    Raises:
        ImageError: by its name it is one, but nothing that OpenSlide, which ends the process without memory, may read.
    """
    is_named = path.suffix.lower() in SUFFIXES
    head = file.read(132)
    file.seek(0)
    if head[:4] not in _TIFF:
        if not is_named or head[128:] == b"DICM":
            return False
        _check_index(path, name)
        return True
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            widths = _tiled_widths(data, name)
    except ImageError:
        if is_named:
            raise
        return False
    except (OSError, ValueError, struct.error, IndexError):
        if is_named:
            raise ImageError(f"{name}: the slide is damaged or cut off") from None
        return False
    return is_named or (len(widths) > 1 and min(widths[1:]) < widths[0])


def _check_index(path: Path, name: str) -> None:
    """The index of a slide in several files may name those beside it alone: OpenSlide would read any that it names."""
    index = path.with_suffix("") / "Slidedat.ini" if path.suffix.lower() == ".mrxs" else path
    if not index.is_file():
        return
    with index.open("rb") as file:
        content = file.read(_MAX_INDEX + 1)
    if len(content) > _MAX_INDEX or any(mark in line for line in _NAMES_FILE.findall(content) for mark in b"/\\"):
        raise ImageError(f"{name}: a slide whose index is too long, or names files of other folders, isn't read")


def _tiled_widths(data: mmap.mmap, name: str) -> list[int]:
    """Of the directories in tiles, once all directories are checked; empty if the first is none of them."""
    wide = _first_wide(data)
    if wide is None:
        return _widths(data, Directory(data), name)
    # Libraries that don't know Hamamatsu's kind would go along shorter places, which may lead nowhere.
    with contextlib.suppress(struct.error, IndexError):
        _widths(data, Directory(data), name)
    return _widths(data, wide, name, is_wide=True)


def _first_wide(data: mmap.mmap) -> Directory | None:
    """The first directory of a file of Hamamatsu's; None for others."""
    try:
        first = Directory(data, struct.unpack_from("<Q", data, 4)[0])
        if data[:4] == b"II*\0" and first.count <= _MAX_TAGS and any(tag.number == _NDPI for tag in first):
            return first
    except (struct.error, IndexError, OverflowError):
        pass
    return None


def _widths(data: mmap.mmap, first: Directory, name: str, is_wide: bool = False) -> list[int]:
    found: list[int] = []
    directory, left, left_bytes = first, _MAX_TAGS, _MAX_TAG_BYTES
    for _ in range(_MAX_DIRECTORIES):
        left -= directory.count
        if left < 0:
            raise ImageError(f"{name}: a slide with more than {_MAX_TAGS:,} tags isn't read")
        left_bytes -= sum(tag.size for tag in directory)
        if left_bytes < 0:
            raise ImageError(f"{name}: a slide whose tags have more than {_MAX_TAG_BYTES >> 20} MiB isn't read")
        sizes = _sizes(directory, name)
        found.append(sizes[_WIDTH] if len(sizes) == len(_SIZES) else 0)
        following = directory.next(is_wide)
        if following is None:
            return [width for width in found if width] if found[0] else []
        directory = following
    raise ImageError(f"{name}: a slide with more than {_MAX_DIRECTORIES} directories isn't read")


def _sizes(directory: Directory, name: str) -> dict[int, int]:
    """Width, and a tile's width and height, as far as they are told."""
    sizes: dict[int, int] = {}
    for tag in directory:
        if tag.number not in _SIZES:
            continue
        value = directory.integer(tag)
        if tag.number in sizes or (tag.number != _WIDTH and not 0 < value <= _MOST_TILE):
            raise ImageError(
                f"{name}: a slide that states one size twice, or in tiles beyond {_MOST_TILE} × {_MOST_TILE} pixels, "
                f"isn't read"
            )
        sizes[tag.number] = value
    return sizes


@dataclass(frozen=True)
class Thumbnail:
    """A level of a slide, made smaller where it is still large."""

    image: Image.Image
    level: int
    sizes: tuple[tuple[int, int], ...]
    """(width, height) of all levels, the full size first."""
    vendor: str
    spacing_mm: tuple[float, float] | None
    """Between rows and columns of the thumbnail."""


def read_slide(path: Path, name: str, limits: Limits, *, level: int | None = None) -> Thumbnail | None:
    """A level of the slide at `path`; None where OpenSlide doesn't know the file.

    Args:
        level: which one, from 1; by default the smallest that still has `SIDE` pixels along its longer side.

    Raises:
        ImageError: a slide without a smaller level, a level beyond the limits, damaged.
        LlavaError: the extra is missing; no such level.
    """
    openslide = require("openslide", "slides")
    if openslide.OpenSlide.detect_format(path) is None:
        return None
    with plain_errors(name, "the slide is damaged or cut off"), openslide.OpenSlide(path) as slide:
        sizes = slide.level_dimensions
        level = _choose(sizes, level, name)
        width, height = sizes[level]
        tiles, cost = _tiles(slide, level)
        limits.check_size(width, height, name, cost)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_jpeg2000(data, sizes[level], tiles, name, limits)
        image = to_rgb(slide.read_region((0, 0), level, sizes[level]))
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        return Thumbnail(image, level, sizes, str(slide.properties.get("openslide.vendor")), _spacing(slide, image))


def _tiles(slide, level: int) -> tuple[int, float]:
    """(number of a level's tiles, cost of a pixel of the level)"""
    sizes = width, height = slide.level_dimensions[level]
    sides = [
        int(slide.properties.get(f"openslide.level[{level}].tile-{side}", size))
        for side, size in zip(("width", "height"), sizes, strict=True)
    ]
    tiles = -(-width // sides[0]) * -(-height // sides[1])
    return tiles, _COST + (sides[0] * sides[1] * _TILE_PIXEL_COST + _TILE_COST) * tiles / (width * height)


def _check_jpeg2000(data: mmap.mmap, size: tuple[int, int], tiles: int, name: str, limits: Limits) -> None:
    """The tiles of a level, where they are JPEG 2000: that takes longest, and each tile may ask for any work."""
    directory = None if data[:4] not in _TIFF or _first_wide(data) else Directory(data)
    while directory is not None:  # as many as were counted
        tags = {tag.number: tag for tag in directory}
        first = {number: directory.integer(tag) for number, tag in tags.items()}
        if (first.get(_WIDTH), first.get(_HEIGHT)) == size and first.get(_COMPRESSION) in _JPEG2000:
            width, height = first[_TILE_WIDTH], first[_TILE_HEIGHT]
            share = tiles * max(1, _LEAST_JPEG2000 // (width * height))
            places = (directory.integers(tags[number]) for number in (_TILE_OFFSETS, _TILE_BYTES))
            for offset, count in set(zip(*places, strict=True)):
                try:
                    if count:
                        check_jpeg2000(data[offset : offset + count], height, width, name, limits, share)
                except ImageError:
                    raise ImageError(
                        f"{name}: a level of {size[0]} × {size[1]} pixels in tiles of JPEG 2000 that are damaged or "
                        f"take too long isn't read; choose a smaller level, or export a part as PNG"
                    ) from None
        directory = directory.next()


def slide_facts(shown: Thumbnail, is_asked: bool) -> ImageFacts:
    """What `read_slide` has made of a slide, and why; `is_asked`: whether of a level that was named."""
    size, (width, height) = shown.image.size, shown.sizes[shown.level]
    stored = f"{shown.vendor}, levels {', '.join(f'{wide} × {high}' for wide, high in shown.sizes)}"
    facts = ImageFacts("slide", *size, len(shown.sizes), shown.level, stored, spacing_mm=shown.spacing_mm)
    which = "as asked" if is_asked else f"the smallest of {SIDE} pixels, never the full size"
    facts.shown.append(f"level {shown.level} of {len(shown.sizes)} ({width} × {height}), {which}")
    if size != (width, height):
        facts.shown.append(f"made smaller to {size[0]} × {size[1]}")
    facts.shown.append("its colours; labels and overviews aren't read")
    return facts


def _choose(sizes: tuple[tuple[int, int], ...], level: int | None, name: str) -> int:
    if len(sizes) < 2:
        raise ImageError(f"{name}: a slide without a smaller level isn't read whole; export a part of it as PNG")
    if level is None:
        return max((place for place in range(1, len(sizes)) if max(sizes[place]) >= SIDE), default=1)
    if not 1 <= level < len(sizes):
        raise LlavaError(f"{name}: level {level} can't be shown; a level from 1 to {len(sizes) - 1} can")
    return level


def _spacing(slide, image: Image.Image) -> tuple[float, float] | None:
    spacing = []
    for axis, place in (("y", 1), ("x", 0)):
        try:
            micrometres = float(slide.properties[f"openslide.mpp-{axis}"])
        except (KeyError, ValueError):
            return None
        spacing.append(micrometres / 1000 * slide.dimensions[place] / image.size[place])
    return spacing[0], spacing[1]
