"""LLaVA's `anyres`: an image fitted into the best of several grids and cut into tiles of the tower's size."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from llava.errors import LlavaError

_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Columns and rows of LLaVA-1.6's default choice, in its order."""

MOST_PINPOINTS = 64
MOST_TILES = 64
"""Of a pair. LLaVA-OneVision's largest, 2304 × 2304 at a tower of 384, is 36."""


def split_into_tiles(image: Image.Image, pinpoints: Sequence[tuple[int, int]], tile: int) -> list[Image.Image]:
    """The image on black in the best of `pinpoints` (width, height), cut into `tile` × `tile`, row by row."""
    width, height = best_pinpoint(*image.size, pinpoints)
    scale = min(width / image.width, height / image.height)
    # The tighter side fills its length exactly; the other is rounded up.
    if width / image.width < height / image.height:
        fitted = (width, min(math.ceil(image.height * scale), height))
    else:
        fitted = (min(math.ceil(image.width * scale), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(fitted), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return [
        canvas.crop((left, top, left + tile, top + tile))
        for top in range(0, height, tile)
        for left in range(0, width, tile)
    ]


def best_pinpoint(width: int, height: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid that keeps most of the image's pixels and, among equals, wastes the least; first wins a tie."""

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def default_pinpoints(tile: int) -> list[tuple[int, int]]:
    return [(columns * tile, rows * tile) for columns, rows in _GRIDS]


def read_pinpoints(pinpoints: Any, tile: int | None = None) -> list[tuple[int, int]]:
    """The config's `image_grid_pinpoints`: pairs, or pairs as text ("[(336, 672), …]").

    Args:
        tile: side of a tile in pixels, for the cap of `MOST_TILES`; None where no image is cut.

    Raises:
        LlavaError: no pairs of positive numbers, more than `MOST_PINPOINTS`, or one of more tiles than the cap.
    """
    try:
        if isinstance(pinpoints, str):
            pinpoints = json.loads(re.sub(r"[()]", lambda match: "[" if match[0] == "(" else "]", pinpoints))
        if len(pinpoints) > MOST_PINPOINTS:
            raise LlavaError(f"image_grid_pinpoints has {len(pinpoints)} pairs; at most {MOST_PINPOINTS} are taken")
        pairs = [(int(width), int(height)) for width, height in pinpoints]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise LlavaError(
            f"image_grid_pinpoints {pinpoints!r:.200} can't be read; give pairs of width and height such as "
            f"[[336, 672]]"
        ) from error
    if not pairs or min(min(pair) for pair in pairs) < 1:
        raise LlavaError("image_grid_pinpoints needs pairs of positive width and height")
    for width, height in pairs:
        if tile and (tiles := -(-width // tile) * -(-height // tile)) > MOST_TILES:
            raise LlavaError(
                f"image_grid_pinpoints: {width} × {height} is {tiles} tiles of {tile} pixels; "
                f"at most {MOST_TILES} are cut"
            )
    return pairs
