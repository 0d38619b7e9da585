"""A file of pixels as Pillow may see it: one known kind, a size within the limits, no metadata.

Pillow keeps and joins metadata in ways that cost far more than the file's bytes, and refuses sound images because of
it. So it is left out here, by walking over the file's parts; only the orientation is read. Parts are counted.
"""

import re
import struct
from dataclasses import dataclass

from llava.errors import ImageError
from llava.images.headers.jpeg import read_jpeg_header, without_metadata
from llava.images.headers.tags import Directory, exif_orientation, xmp_orientation
from llava.images.limits import Limits

MAX_PARTS = 200_000
"""Chunks of a PNG or WebP, blocks of a GIF: a gigabyte in the usual pieces of 8 KiB."""
_MAX_METADATA = 64 << 20
_MAX_XMP = 64 << 10

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})

_MAX_TAGS = 4096
_MAX_TAG_VALUES = 250_000
_MAX_TAG_BYTES = 16 << 20
_PIXELS_OF_SMALL_TILES = 1 << 22
_SIZE_TAGS = {256: 0, 257: 0, 258: 0, 262: 1, 277: 1, 278: 0, 322: 0, 323: 0, 274: 0}
"""Width, height, bits, which value is white, samples, rows of a strip, a tile's width and height, orientation;
their values where absent."""
_ORIENTATION, _XMP = 274, 700
_HIDDEN_TAGS = frozenset({_ORIENTATION, _XMP, 330, 34665, 34853, 40965})
"""Pillow would turn the image by the first two itself, and read all directories at which the others point (smaller
images, EXIF, GPS and EXIF's interoperability)."""

_PPM_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PPM = re.compile(rb"P[1-6f]" + (_PPM_SPACE + rb"[\d.+-]+") * 2)


@dataclass(frozen=True)
class Container:
    """`content` is of Pillow's `kind`; `orientation` is 1 to 8 as EXIF counts."""

    kind: str
    content: bytes
    orientation: int = 1
    is_white_zero: bool = False
    """Of a TIFF: whether its least value is white."""


def read_container(content: bytes, name: str, limits: Limits) -> Container | None:
    """What kind of file this is, checked and without its metadata; None for no kind of them.

    Raises:
        ImageError: beyond the limits, more parts than an image has, damaged.
    """
    kind = _kind(content)
    if kind not in limits.formats:
        return None
    return _READERS[kind](content, name, limits)


def _kind(content: bytes) -> str | None:
    if content[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if content[:8] == _PNG_START:
        return "PNG"
    if content[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content[:2] == b"BM":
        return "BMP"
    return "PPM" if _PPM.match(content[:4096]) else None


def _read_jpeg(content: bytes, name: str, limits: Limits) -> Container:
    header = read_jpeg_header(content, name)
    limits.check_size(header.width, header.height, name, header.cost)
    return Container("JPEG", without_metadata(content, header), header.orientation)


def _read_png(content: bytes, name: str, limits: Limits) -> Container:
    view, place, parts, dropped, orientation = memoryview(content), 8, [memoryview(content)[:8]], 0, 1
    for _ in range(MAX_PARTS):
        if place + 8 > len(content):
            break
        length, kind = struct.unpack_from(">L4s", content, place)
        end = place + 12 + length
        if kind in _PNG_NEEDED:
            parts.append(view[place:end])
        else:
            dropped += end - place
            if kind == b"eXIf":
                orientation = exif_orientation(view[place + 8 : end - 4])
            elif kind == b"iTXt" and length <= _MAX_XMP and orientation == 1:
                orientation = xmp_orientation(view[place + 8 : end - 4])
        place = end
        if kind == b"IEND":
            break
    else:
        raise ImageError(f"{name}: a PNG with more than {MAX_PARTS:,} chunks isn't read")
    if len(content) >= 33 and content[12:16] == b"IHDR":
        width, height, depth, colour = struct.unpack_from(">LLBB", content, 16)
        limits.check_size(width, height, name, 2.0 if depth == 16 or colour in (4, 6) else 1.3)
    if dropped > _MAX_METADATA:
        raise ImageError(f"{name}: {dropped / 2**20:.0f} MiB of metadata are more than an image may have")
    return Container("PNG", b"".join(parts) if dropped else content, orientation)


def _read_gif(content: bytes, name: str, limits: Limits) -> Container:
    """The header, the last graphic control before the first image, and all from that image on."""
    if len(content) < 13:
        raise ImageError(f"{name}: the image is damaged or cut off (a GIF's header)")
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    limits.check_size(width, height, name, 2.0)
    start = place = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    control = b""
    for _ in range(MAX_PARTS):
        if content[place : place + 1] != b"!":
            break
        begin, label = place, content[place + 1 : place + 2]
        place += 2
        for _ in range(MAX_PARTS):
            if place >= len(content) or not content[place]:
                break
            place += content[place] + 1
        else:
            raise ImageError(f"{name}: a GIF with more than {MAX_PARTS:,} blocks in one extension isn't read")
        place += 1
        if label == b"\xf9":
            control = content[begin:place]
    else:
        raise ImageError(f"{name}: a GIF with more than {MAX_PARTS:,} extensions isn't read")
    if content[place : place + 1] == b",":
        left, top, own_width, own_height = struct.unpack_from("<HHHH", content.ljust(place + 9, b"\0"), place + 1)
        limits.check_size(max(width, left + own_width), max(height, top + own_height), name, 2.0)
    return Container("GIF", content if place == start else content[:start] + control[:8] + content[place:])


def _read_tiff(content: bytes, name: str, limits: Limits) -> Container:
    """Once no tag of the first directory (the only one read) asks for more than an image needs. Tags that Pillow
    isn't to follow get a number that means nothing."""
    directory = Directory(content)
    if directory.count > _MAX_TAGS:
        raise ImageError(f"{name}: a TIFF with {directory.count:,} tags isn't read (at most {_MAX_TAGS})")
    sizes: dict[int, int] = {}
    total, hidden, xmp = 0, [], b""
    for tag in directory:
        total += tag.size
        if tag.count > _MAX_TAG_VALUES and tag.kind not in (1, 2, 7):
            raise ImageError(f"{name}: a TIFF's tag with {tag.count:,} values isn't read (at most {_MAX_TAG_VALUES})")
        if tag.number in sizes:
            # Which of them counts, readers don't agree.
            raise ImageError(f"{name}: a TIFF that states one size twice (tag {tag.number}) isn't read")
        if tag.number in _SIZE_TAGS:
            sizes[tag.number] = directory.integer(tag)
        if tag.number in _HIDDEN_TAGS:
            hidden.append(tag.place)
        if tag.number == _XMP and tag.size <= _MAX_XMP:
            xmp = content[tag.offset : tag.offset + tag.size]
    if total > _MAX_TAG_BYTES:
        raise ImageError(f"{name}: {total / 2**20:.0f} MiB of tags are more than a TIFF may have")
    orientation = sizes.get(_ORIENTATION) or xmp_orientation(xmp)
    sizes = _SIZE_TAGS | sizes
    width, height, tile_width, tile_height = sizes[256], sizes[257], sizes[322], sizes[323]
    limits.check_size(width, height, name, 1.3 * max(3, sizes[277]) / 3)
    if tile_width * tile_height > max(4 * width * height, _PIXELS_OF_SMALL_TILES):
        raise ImageError(
            f"{name}: a TIFF of {width} × {height} pixels in tiles of {tile_width} × {tile_height} isn't read"
        )
    return Container("TIFF", _without_numbers(content, hidden), orientation, sizes[262] == 0)


def _without_numbers(content: bytes, places: list[int]) -> bytes:
    """With the tags of the entries at these places replaced by a number of nobody's."""
    if not places:
        return content
    view, done = memoryview(content), 0
    parts: list[bytes | memoryview] = []
    for place in places:
        parts += [view[done:place], b"\xff\xff"]
        done = place + 2
    return b"".join([*parts, view[done:]])


def _read_webp(content: bytes, name: str, limits: Limits) -> Container:
    place, orientation = 12, 1
    for _ in range(MAX_PARTS):
        if place + 8 > len(content):
            break
        kind, length = struct.unpack_from("<4sL", content, place)
        begin = place + 8
        if kind == b"VP8X" and begin + 10 <= len(content):
            width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (begin + 4, begin + 7))
            limits.check_size(width, height, name, 2.0)
        elif kind == b"EXIF":
            orientation = exif_orientation(memoryview(content)[begin : begin + length])
        elif kind == b"XMP " and length <= _MAX_XMP and orientation == 1:
            orientation = xmp_orientation(memoryview(content)[begin : begin + length])
        place = begin + length + length % 2
    else:
        raise ImageError(f"{name}: a WebP with more than {MAX_PARTS:,} chunks isn't read")
    return Container("WEBP", content, orientation)


def _read_unchanged(kind: str):
    return lambda content, name, limits: Container(kind, content)


_READERS = {
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "GIF": _read_gif,
    "TIFF": _read_tiff,
    "WEBP": _read_webp,
    "BMP": _read_unchanged("BMP"),
    "PPM": _read_unchanged("PPM"),
}
