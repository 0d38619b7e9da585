"""Compressed frames of DICOM files, measured before a codec sees them: the codestream's own size counts, not what
the DICOM header says of it.

JPEG and JPEG-LS by their frame header and number of scans, JPEG 2000 (ISO 15444-1 annex A) also by the structures
that its coding parameters ask for: a decoder sets up tiles, precincts and code-blocks before it reads any of them.
RLE (PS3.5 annex G) is unpacked here, by Pillow: pydicom's own reader has no end but the data's.
"""

import struct

import numpy as np
from PIL import Image

from llava.errors import ImageError
from llava.images.headers.jpeg import read_jpeg_header, with_whole_scans
from llava.images.limits import Limits

_J2K_START = b"\xff\x4f\xff\x51"
_START_OF_TILE, _START_OF_DATA, _CODING, _COMPONENT_CODING = 0xFF90, 0xFF93, 0xFF52, 0xFF53
_MAX_STRUCTURES = 2_000_000
_MAX_LAYERED_PRECINCTS = 20_000_000
_MAX_TILE_PARTS = 100_000
_J2K_COST, _JPEG_COST, _OTHER_JPEG_COST = 2.5, 0.5, 2.5
"""Of a sample against a pixel of a plain JPEG: wavelets (where a sample has no more than a byte of data), the same JPEG
by another library, lossless and JPEG-LS."""


def check_jpeg(frame: bytes, rows: int, columns: int, name: str, limits: Limits) -> bytes:
    """A JPEG or JPEG-LS frame as decoders read it.

    Raises:
        ImageError: another size than the header's, beyond the limits.
    """
    if frame[:2] != b"\xff\xd8":
        raise ImageError(f"{name}: the DICOM pixels are damaged (no JPEG)")
    header = read_jpeg_header(frame, name)
    _check_size(header.height, header.width, rows, columns, name)
    if not 1 <= header.components <= 4 or header.precision > 16:
        raise ImageError(f"{name}: a JPEG of {header.components} components of {header.precision} bits isn't read")
    base = _JPEG_COST if header.marker in (0xC0, 0xC1, 0xC2) else _OTHER_JPEG_COST
    limits.check_size(header.width, header.height, name, max(1.0, base * header.components) * header.cost)
    return with_whole_scans(frame, header)


def check_jpeg2000(frame: bytes, rows: int, columns: int, name: str, limits: Limits, share: int = 1) -> bytes:
    """The bare codestream of a frame, without boxes around it (which may ask for a palette of any size).

    `share`: how many such frames are read together, for which the limits hold.

    Raises:
        ImageError: another size than the header's, beyond the limits, more structures than an image has.
    """
    start = frame.find(_J2K_START)
    if start < 0:
        raise ImageError(f"{name}: the DICOM pixels are damaged (no JPEG 2000)")
    frame = frame[start:]
    try:
        _check_j2k(frame, rows, columns, name, limits, share)
    except struct.error:
        raise ImageError(f"{name}: the DICOM pixels are damaged or cut off (JPEG 2000)") from None
    return frame


def sample_bits(frame: bytes, name: str) -> int:
    """Bits of a sample of a JPEG, JPEG-LS or JPEG 2000 frame that was checked."""
    if frame[:2] == b"\xff\xd8":
        return read_jpeg_header(frame, name).precision
    return (frame[frame.index(_J2K_START) + 42] & 0x7F) + 1


def _check_j2k(frame: bytes, rows: int, columns: int, name: str, limits: Limits, share: int) -> None:
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6L", frame, 8)
    (components,) = struct.unpack_from(">H", frame, 40)
    width, height = right - left, bottom - top
    _check_size(height, width, rows, columns, name)
    if not 1 <= components <= 4 or any(byte & 0x7F > 31 for byte in frame[42 : 42 + 3 * components : 3]):
        raise ImageError(f"{name}: a JPEG 2000 of {components} components isn't read")
    # A decoder takes as long for the bits of a sample as for setting one up.
    bytes_each = len(frame) / max(1, width * height * components)
    limits.check_size(width, height, name, share * _J2K_COST * components * max(1.0, bytes_each))
    if not tile_width or not tile_height:
        raise ImageError(f"{name}: the DICOM pixels are damaged (JPEG 2000)")
    tiles = -(-right // tile_width) * -(-bottom // tile_height)
    for marker, place in _j2k_markers(frame, name):
        if marker not in (_CODING, _COMPONENT_CODING):
            continue
        if marker == _CODING:
            style, _, layers = struct.unpack_from(">BBH", frame, place)
            parameters = place + 5
        else:
            # Not so far apart that one of them would be meant for more than its component: the worst is assumed.
            style, layers, parameters = frame[place + 1], 1, place + 2
        levels, block_width, block_height = struct.unpack_from("BBB", frame, parameters)
        levels &= 31
        sizes = frame[parameters + 5 : parameters + 6 + levels] if style & 1 else b""
        structures, precincts = _structures(width, height, tiles, levels, block_width & 15, block_height & 15, sizes)
        count = share * components
        if structures * count > _MAX_STRUCTURES or precincts * layers * count > _MAX_LAYERED_PRECINCTS:
            raise ImageError(f"{name}: a JPEG 2000 in such small parts isn't read")


def _structures(width, height, tiles, levels, block_width, block_height, sizes: bytes) -> tuple[int, int]:
    """(tiles, precincts and code-blocks, precincts alone) of one component."""
    structures = all_precincts = 0
    for level in range(levels + 1):
        scale = 1 << (levels - level)
        # Precincts of 32,768 where none are given.
        size = sizes[level] if level < len(sizes) else 0xFF
        precincts = max(tiles, -(-width // (scale << (size & 15))) * -(-height // (scale << (size >> 4))))
        wide, high = (
            min(exponent + 2, part) for exponent, part in ((block_width, size & 15), (block_height, size >> 4))
        )
        all_precincts += precincts
        structures += 3 * precincts + -(-width // (scale << wide)) * -(-height // (scale << high))
    return structures, all_precincts


def _j2k_markers(frame: bytes, name: str):
    """(marker, where its parameters begin) of the main header and of the headers of all tile-parts."""
    place, tile_end = 2, 0
    for _ in range(_MAX_TILE_PARTS):
        if place + 4 > len(frame):
            return
        marker, length = struct.unpack_from(">HH", frame, place)
        if marker == _START_OF_TILE:
            (size,) = struct.unpack_from(">L", frame, place + 6)
            # 0: the last one, to the end.
            tile_end = place + size if size else len(frame)
        if marker == _START_OF_DATA:
            if tile_end <= place:
                return
            place = tile_end
            continue
        if marker < 0xFF00:
            return
        yield marker, place + 4
        place += 2 + length
    raise ImageError(f"{name}: a JPEG 2000 in such small parts isn't read")


def unpack_rle(frame: bytes, rows: int, columns: int, samples: int, bits: int, name: str) -> bytes:
    """Little endian values, plane by plane (planar configuration 1) of one frame.

    Raises:
        ImageError: another number of segments than such a frame has, cut off.
    """
    width, size = bits // 8, rows * columns
    damaged = ImageError(f"{name}: the DICOM pixels are damaged or cut off (RLE)")
    if len(frame) < 64 or bits % 8:
        raise damaged
    count, *starts = struct.unpack_from("<16L", frame)
    if count != samples * width:
        raise damaged
    ends = [*starts[1:count], len(frame)]
    values = np.empty((samples, size, width), np.uint8)
    for segment in range(count):
        data = frame[starts[segment] : ends[segment]]
        try:
            # One long row: some writers let a run go on into the next.
            plane = Image.frombytes("L", (size, 1), data, "packbits", "L")
        except (ValueError, OSError, IndexError):
            raise damaged from None
        # From the most significant byte to the least.
        values[segment // width, :, width - 1 - segment % width] = np.asarray(plane)[0]
    return values.tobytes()


def _check_size(height: int, width: int, rows: int, columns: int, name: str) -> None:
    if (height, width) != (rows, columns):
        raise ImageError(
            f"{name}: the compressed pixels are {width} × {height}, but the DICOM header says {columns} × {rows}"
        )
