"""Slides of a few megabytes that would cost gigabytes or minutes: a file of Aperio's, its levels by their tiles."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

DEFLATE, JPEG_2000 = 8, 33_005
VENDOR = b"Aperio Image Library v1\0"


class Level(NamedTuple):
    width: int
    height: int
    side: int
    """Of a tile; all are alike."""
    tile: bytes
    compression: int = DEFLATE


def aperio(*levels: Level, shared: bytes = b"", more: list[tuple[int, int, int, int]] | None = None) -> bytes:
    """`more` are further tags of each level, whose values stand in `shared`, from the tenth byte."""
    data = bytearray(b"II*\0" + bytes(6) + shared)
    pointer = 4
    for number, (width, height, side, tile, compression) in enumerate(levels):
        count = -(-width // side) * -(-height // side)
        places = []
        for part in (tile, struct.pack("<3H", 8, 8, 8), VENDOR, struct.pack("<L", 0)):
            data += bytes(len(data) % 2)
            places.append(len(data))
            data += part
        first, bits, text, offsets = places
        data[offsets:] = struct.pack("<L", first) * count
        counts = len(data)
        data += struct.pack("<L", len(tile)) * count
        tags = [
            (254, 4, 1, int(number > 0)), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits),
            (259, 3, 1, compression), (262, 3, 1, 2), (270, 2, len(VENDOR), text), (277, 3, 1, 3), (284, 3, 1, 1),
            (322, 4, 1, side), (323, 4, 1, side), (324, 4, count, offsets if count > 1 else first),
            (325, 4, count, counts if count > 1 else len(tile)), *(more or ()),
        ]  # fmt: skip
        data += bytes(len(data) % 2)
        struct.pack_into("<L", data, pointer, len(data))
        data += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHLL", *tag) for tag in tags)
        pointer = len(data)
        data += bytes(4)
    return bytes(data)


def black(side: int) -> bytes:
    return zlib.compress(bytes(side * side * 3))


def jpeg_2000(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True, irreversible=False, mct=0)
    return buffer.getvalue()


def slide_tags() -> bytes:
    """2000 tags of the same four megabytes, in each level."""
    levels = Level(128, 128, 32, black(32)), Level(64, 64, 32, black(32))
    return aperio(*levels, shared=bytes(4 << 20), more=[(40_000 + place, 7, 4 << 20, 10) for place in range(2000)])


def slide_small_tiles() -> bytes:
    """A level of four million tiles."""
    return aperio(Level(16_384, 16_384, 512, black(512)), Level(4096, 4096, 2, black(2)))


def slide_wide_tiles() -> bytes:
    """A level whose tiles have eight times its pixels."""
    tile = black(4096)
    return aperio(Level(200_000, 1000, 4096, tile), Level(99_000, 500, 4096, tile))


def slide_noise() -> bytes:
    """25 million pixels of JPEG 2000 without loss."""
    noise = jpeg_2000(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))
    return aperio(Level(16_384, 16_384, 512, black(512)), Level(5120, 5120, 256, noise, JPEG_2000))


def slide_small_wavelets() -> bytes:
    """200,000 tiles of JPEG 2000 of 8 × 8 pixels."""
    tile = jpeg_2000(np.zeros((8, 8, 3), np.uint8))
    return aperio(Level(16_384, 16_384, 512, black(512)), Level(3600, 3600, 8, tile, JPEG_2000))


SLIDES: dict[str, Callable[[], bytes]] = {
    maker.__name__: maker
    for maker in (slide_tags, slide_small_tiles, slide_wide_tiles, slide_noise, slide_small_wavelets)
}


def sound(compression: int) -> bytes:
    """A level of 2048 × 1024 in tiles of 256 × 256."""
    tile = jpeg_2000(np.full((256, 256, 3), 90, np.uint8)) if compression == JPEG_2000 else black(256)
    return aperio(Level(8192, 4096, 512, black(512)), Level(2048, 1024, 256, tile, compression))
