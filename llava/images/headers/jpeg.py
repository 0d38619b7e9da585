"""JPEG's markers (ISO 10918-1 annex B; JPEG-LS has the same), read before any decoder sees the data."""

import re
import struct
from dataclasses import dataclass

from llava.errors import ImageError
from llava.images.headers.tags import exif_orientation, xmp_orientation

_START_OF_FRAME = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_SCAN, _END = 0xDA, 0xD9
_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
"""APP1 to APP15 without APP14 (it tells the colours), and comments: no pixel depends on them."""
_MAX_SEGMENTS = 4000
MAX_SCANS = 500
"""libjpeg-turbo's own advice; what cameras and optimisers write has 1 to about 60."""
_MARKER = re.compile(rb"\xff[^\x00\xff]")


@dataclass(frozen=True)
class JpegHeader:
    """What stands before the first scan, and how many scans there are."""

    width: int
    height: int
    components: int
    precision: int
    marker: int
    """Of the frame: 0xC0 baseline, 0xC2 progressive, 0xF7 JPEG-LS, ..."""
    scans: int
    orientation: int
    segments: tuple[tuple[int, int], ...]
    """(begin, end) of those that a decoder needs, up to the first scan."""
    first_scan: int

    @property
    def cost(self) -> float:
        """Of a pixel, against one of a plain JPEG: each further scan goes over the whole image again."""
        return 1.0 + 0.1 * (self.scans - 1)


def read_jpeg_header(content: bytes, name: str) -> JpegHeader:
    """Raises ImageError for damaged markers, and more segments or scans than an image has."""
    frame: tuple[int, ...] | None = None
    orientation, needed, start = 1, [], 2
    for _ in range(_MAX_SEGMENTS):
        # Fill bytes (0xFF) before a marker, and what other readers skip, are left out.
        match = _MARKER.search(content, start)
        if match is None:
            raise ImageError(f"{name}: the image is damaged or cut off (no scan in a JPEG)")
        marker, begin = match[0][-1], match.end() - 2
        start = match.end()
        if marker == _SCAN:
            break
        if marker == _END:
            raise ImageError(f"{name}: the image is damaged (a JPEG that ends before its first scan)")
        if marker in _WITHOUT_LENGTH:
            continue
        if start + 2 > len(content):
            raise ImageError(f"{name}: the image is damaged or cut off (a JPEG's segment)")
        start += struct.unpack_from(">H", content, start)[0]
        if marker in _START_OF_FRAME:
            if start > len(content) or start - begin < 11:
                raise ImageError(f"{name}: the image is damaged or cut off (a JPEG's frame header)")
            # Two frames are for a hierarchical JPEG, which no decoder here reads.
            if frame is not None:
                raise ImageError(f"{name}: a JPEG with several frame headers isn't read")
            frame = (marker, *struct.unpack_from(">BHHB", content, begin + 4))
        elif marker == 0xE1 and orientation == 1:
            orientation = _orientation(memoryview(content)[begin + 4 : start])
        if marker not in _METADATA:
            needed.append((begin, start))
    else:
        raise ImageError(f"{name}: a JPEG with more than {_MAX_SEGMENTS:,} segments before its first scan isn't read")
    if frame is None:
        raise ImageError(f"{name}: the image is damaged (a JPEG's scan without a frame)")
    marker, precision, height, width, components = frame
    # Within a scan 0xFF is followed by 0 or a restart marker, so this counts no more than a few bytes too much.
    scans = content.count(b"\xff\xda", begin)
    if scans > MAX_SCANS:
        raise ImageError(f"{name}: a JPEG with {scans:,} scans isn't read (at most {MAX_SCANS})")
    return JpegHeader(width, height, components, precision, marker, scans, orientation, tuple(needed), begin)


def without_metadata(content: bytes, header: JpegHeader) -> bytes:
    """The same pixels; none of the segments whose reading grows with their square."""
    if header.first_scan == 2 + sum(end - begin for begin, end in header.segments):
        return content
    view = memoryview(content)
    return b"".join([view[:2], *(view[begin:end] for begin, end in header.segments), view[header.first_scan :]])


def with_whole_scans(content: bytes, header: JpegHeader) -> bytes:
    """A sequential JPEG's scans always hold all coefficients; some writers leave zeros where that is said."""
    if header.marker not in (0xC0, 0xC1):
        return content
    mended, place = bytearray(content), header.first_scan
    while place >= 0 and place + 5 < len(mended):
        said = place + 5 + 2 * mended[place + 4]
        if len(mended[said : said + 3]) == 3:
            mended[said : said + 3] = b"\0\x3f\0"
        place = content.find(b"\xff\xda", place + 2)
    return bytes(mended)


def _orientation(segment: memoryview) -> int:
    if bytes(segment[:6]) == b"Exif\0\0":
        return exif_orientation(segment)
    return xmp_orientation(segment)
