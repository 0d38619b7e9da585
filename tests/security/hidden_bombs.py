"""Files whose cost stands behind what a first look at them checks: directories that others point at, palettes that
grow, tables, frames that are only counted, headers that are only sorted.

As in `image_bombs`, names map to what makes the bytes: `HIDDEN` are opened, `COUNTED` described, `SORTED` given a
place in their series.
"""

import struct

from tests.security.image_bombs import (
    _DEFLATED,
    _EXPLICIT,
    _JPEG,
    deflated_dicom,
    dicom,
    element,
    encoded,
    image_module,
    jpeg_exif,
    short,
    tiff,
    zeros_deflated,
)

_MEGABYTES = 4 << 20


def image_tags(at: int = 8) -> list[tuple[int, int, int, int]]:
    """Of a TIFF of 8 × 8 grey pixels, which stand at `at`."""
    plain = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, at)]
    return [*plain, (277, 3, 1, 1), (278, 4, 1, 8), (279, 4, 1, 64)]


def big_tiff(entries: list[tuple[int, int, int, int]], data: bytes) -> bytes:
    """As `tiff`; `data` follows the header's 16 bytes."""
    directory = struct.pack("<Q", len(entries)) + b"".join(struct.pack("<HHQQ", *entry) for entry in sorted(entries))
    return b"II+\0" + struct.pack("<HHQ", 8, 0, 16 + len(data)) + data + directory + bytes(8)


def tiff_exif() -> bytes:
    """A directory of 800 tags, each the same four megabytes."""
    return _pointed(34665)


def tiff_gps() -> bytes:
    return _pointed(34853)


def _pointed(number: int) -> bytes:
    entries = b"".join(struct.pack("<HHLL", 1 + place, 7, _MEGABYTES, 8) for place in range(800))
    directory = struct.pack("<H", 800) + entries + bytes(4)
    return tiff([*image_tags(), (number, 4, 1, 8 + _MEGABYTES)], bytes(_MEGABYTES) + directory)


def big_tiff_exif() -> bytes:
    entries = b"".join(struct.pack("<HHQQ", 1 + place, 7, _MEGABYTES, 16) for place in range(800))
    directory = struct.pack("<Q", 800) + entries + bytes(8)
    return big_tiff([*image_tags(16), (34665, 4, 1, 16 + _MEGABYTES)], bytes(_MEGABYTES) + directory)


def palette_image(segments: bytes, descriptor: tuple[int, int, int] = (256, 0, 16), pixels: bytes = bytes(64)) -> bytes:
    """8 × 8 pixels whose red, green and blue are the same palette in segments."""
    numbers = ((0x10, 8), (0x11, 8), (0x100, 8), (0x101, 8), (0x102, 7), (0x103, 0))
    module = [short(0x28, 2, 1), element(0x28, 4, b"CS", b"PALETTE COLOR "), *(short(0x28, *pair) for pair in numbers)]
    module += [element(0x28, 0x1101 + place, b"US", struct.pack("<3H", *descriptor)) for place in range(3)]
    module += [element(0x28, 0x1221 + place, b"OW", segments) for place in range(3)]
    return dicom(_EXPLICIT, b"".join(module) + element(0x7FE0, 0x10, b"OW", pixels))


def palette_lines() -> bytes:
    """Forty thousand segments of 65,535 equal values."""
    return palette_image(struct.pack("<3H", 0, 1, 5) + struct.pack("<3H", 1, 65_535, 5) * 40_000)


def palette_repeats() -> bytes:
    """Each segment repeats all segments before it."""
    segments = struct.pack("<6H", 0, 1, 5, 1, 65_535, 5)
    for place in range(14):
        segments += struct.pack("<4H", 2, 1 + place, 3, 0)
    return palette_image(segments)


def offsets_in_dicom() -> bytes:
    """A table of 75 million frames in front of the only one."""
    size, frame = 300 << 20, encoded("JPEG")
    begin = struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, size)
    end = struct.pack("<HHL", 0xFFFE, 0xE000, len(frame)) + frame + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    return dicom(_JPEG, image_module(64, 64) + begin + bytes(size) + end)


def tiff_directories() -> bytes:
    """Two hundred thousand images."""
    entries = b"".join(struct.pack("<HHLL", *entry) for entry in image_tags())
    step, count = 6 + len(entries), 200_000
    places = [72 + step * (place + 1) for place in range(count - 1)] + [0]
    images = b"".join(struct.pack("<H", 9) + entries + struct.pack("<L", place) for place in places)
    return b"II*\0" + struct.pack("<L", 72) + bytes(64) + images


def tiff_second_image() -> bytes:
    """1500 tags of the same four megabytes, in the second image."""
    first = tiff(image_tags(), bytes(_MEGABYTES))
    entries = b"".join(struct.pack("<HHLL", 1000 + place, 7, _MEGABYTES, 8) for place in range(1500))
    return first[:-4] + struct.pack("<L", len(first)) + struct.pack("<H", 1500) + entries + bytes(4)


def gif_images() -> bytes:
    """Six million images of one pixel."""
    frame = b",\0\0\0\0\1\0\1\0\0" + b"\x02\x02\x44\x01\0"
    return encoded("GIF")[:-1] + frame * 6_000_000 + b";"


def groups_in_dicom() -> bytes:
    """A million and a half groups of frames."""
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 1_500_000
    groups = (
        struct.pack("<HH2sHL", 0x5200, 0x9230, b"SQ", 0, 0xFFFFFFFF) + items + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    )
    return dicom(_EXPLICIT, image_module(8, 8) + groups + element(0x7FE0, 0x10, b"OB", bytes(64)))


def frames_in_dicom() -> bytes:
    """Four million frames by the header, of a byte each."""
    frames = element(0x28, 8, b"IS", b"4000000 ")
    module = image_module(8, 8).replace(short(0x28, 0x10, 8), frames + short(0x28, 0x10, 8))
    return dicom(_EXPLICIT, module + element(0x7FE0, 0x10, b"OB", bytes(4_000_000)))


def deflated_series() -> bytes:
    return dicom(_DEFLATED, zeros_deflated(4096, -15))


def _named(*functions) -> dict:
    return {function.__name__: function for function in functions}


HIDDEN = _named(tiff_exif, tiff_gps, big_tiff_exif, palette_lines, palette_repeats, offsets_in_dicom)
COUNTED = _named(tiff_exif, tiff_directories, tiff_second_image, gif_images, jpeg_exif)
SORTED = _named(deflated_dicom, deflated_series, groups_in_dicom, frames_in_dicom)
