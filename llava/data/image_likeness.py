"""Which images are the same or nearly so: by decoded pixels, and by a perceptual hash checked on thumbnails.

A perceptual hash alone calls two chest X-rays alike because all chest X-rays are; so its hits are confirmed by
the correlation of small grey copies.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llava.images import open_image

HASH_DISTANCE = 10
"""Of 64 bits: more than this apart is another image."""
CORRELATION = 0.98
"""Of the thumbnails: less than this is another image."""

_SIDE = 64  # of thumbnails, pixels
_WAVES = 8  # lowest waves of the cosine transform along each side that make the hash
_COSINES = np.cos(np.pi * (2 * np.arange(_SIDE)[None, :] + 1) * np.arange(_WAVES)[:, None] / (2 * _SIDE)).astype(
    np.float32
)
_BIT_COUNTS = np.array([bin(value).count("1") for value in range(256)], dtype=np.int32)


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of an image: checksum of its RGB pixels, 64 hash bits, a thumbnail of mean 0 and length 1."""

    pixels: str
    bits: np.ndarray
    thumbnail: np.ndarray


@dataclass(frozen=True)
class Likeness:
    """Two images that are the same (`identical`) or nearly so; `distance` in hash bits of 64."""

    first: str
    second: str
    identical: bool
    distance: int
    correlation: float


def fingerprint(source: str | Path | bytes) -> Fingerprint:
    """Read an image (whatever `open_image` takes); a file that is none is a LlavaError that names it."""
    image = open_image(source)
    checksum = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32)
    waves = _COSINES @ grey @ _COSINES.T
    waves[0, 0] = np.median(waves)  # mean brightness says nothing of what is shown
    bits = np.packbits((waves > np.median(waves)).reshape(-1))
    centred = grey - grey.mean()
    length = float(np.linalg.norm(centred))
    return Fingerprint(checksum, bits, (centred / length if length else centred).reshape(-1))


def alike(first: dict[str, Fingerprint], second: dict[str, Fingerprint]) -> list[Likeness]:
    """Pairs (an image of `first`, an image of `second`) that are the same or nearly so, by name in order."""
    if not first or not second:
        return []
    names, prints = list(second), list(second.values())
    bits, thumbnails = np.stack([p.bits for p in prints]), np.stack([p.thumbnail for p in prints])
    pixels = np.array([p.pixels for p in prints])
    found = []
    for name, mark in first.items():
        distances = _BIT_COUNTS[np.bitwise_xor(bits, mark.bits)].sum(axis=1)
        correlations = thumbnails @ mark.thumbnail
        identical = pixels == mark.pixels
        # Images of one colour have no correlation, not even with themselves.
        for index in np.flatnonzero(identical | (distances <= HASH_DISTANCE) & (correlations >= CORRELATION)):
            likeness = int(distances[index]), float(correlations[index])
            found.append(Likeness(name, names[index], bool(identical[index]), *likeness))
    return found


def groups(pairs: Iterable[tuple[str, str]], names: Sequence[str]) -> dict[str, int]:
    """Number of the group that each name is in, when pairs are in one group."""
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for first, second in pairs:
        parent[root(first)] = root(second)
    numbers: dict[str, int] = {}
    return {name: numbers.setdefault(root(name), len(numbers)) for name in names}
