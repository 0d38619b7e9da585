"""Pillow's many pixel modes to 8-bit RGB, without the silent losses of `convert("RGB")`; RGB as a PNG file."""

import base64
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops

WHITE = (255, 255, 255)
_BIT_DEPTHS = (8, 10, 12, 14, 16)
_BAND_VALUES = 1 << 20


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB.

    Transparency is laid over white (dropping it would show whatever colour lies beneath), grey of more than
    8 bits is scaled (Pillow would clip it at 255: an almost white image).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return grey_to_rgb(scale_grey(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, WHITE)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def pad_to_square(image: Image.Image, colour: tuple[int, ...] | int) -> Image.Image:
    """The image in the middle of a square of `colour`; an odd pixel goes to the right or below."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def grey_to_rgb(grey: np.ndarray) -> Image.Image:
    """uint8 `[height, width]` to an RGB image with three equal channels."""
    return Image.fromarray(np.ascontiguousarray(grey, np.uint8)).convert("RGB")


def scale_grey(values: np.ndarray) -> np.ndarray:
    """Grey values of any depth `[height, width]` to uint8.

    Whole numbers are taken as 8, 10, 12, 14 or 16 bits, the least that holds the largest, so that images of
    one device keep their brightness. Floats from 0 to 1 are taken as such. Anything else goes by its range;
    what isn't finite is the least value.
    """
    values = np.asarray(values)
    low, high = finite_range(values)
    if np.issubdtype(values.dtype, np.floating):
        if low >= 0 and high <= 1:
            low, high = 0, 1
        return in_bands(lambda band: scale_range(np.where(np.isfinite(band), band, low), low, high), values)
    if low >= 0 and high < 1 << _BIT_DEPTHS[-1]:
        depth = next(bits for bits in _BIT_DEPTHS if high < 1 << bits)
        low, high = 0, (1 << depth) - 1
    return in_bands(lambda band: scale_range(band, low, high), values)


def scale_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` to 0, `high` to 255, linear between, clipped outside; uint8. A flat image is black."""
    span = float(high) - float(low)
    if span <= 0:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / span)
    return (np.clip(scaled, 0, 255) + 0.5).astype(np.uint8)


def finite_range(values: np.ndarray) -> tuple[float, float]:
    """The least and the largest finite value; (0, 0) without one."""
    if not np.issubdtype(values.dtype, np.floating):
        return values.min(), values.max()
    ranges = []
    for band in _bands(values):
        finite = band[np.isfinite(band)]
        if finite.size:
            ranges.append((finite.min(), finite.max()))
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else (0, 0)


def in_bands(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """`function` of `values`, band of rows by band of rows: what it makes on the way stays small, and in the cache.

    It has to treat each pixel by itself, and to give uint8.
    """
    bands = _bands(values)
    if len(bands) == 1:
        return function(values)
    first = function(bands[0])
    done, result = len(first), np.empty((len(values), *first.shape[1:]), first.dtype)
    result[:done] = first
    for band in bands[1:]:
        result[done : done + len(band)] = function(band)
        done += len(band)
    return result


def _bands(values: np.ndarray) -> list[np.ndarray]:
    rows = max(1, _BAND_VALUES // max(1, values[:1].size))
    return [values[start : start + rows] for start in range(0, len(values), rows)] or [values]


def png_data_url(image: Image.Image) -> str:
    """The image without loss as a data: URL, which every OpenAI-compatible server and browser can read."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file.

    Three equal channels are written as one, and packed lightly: a noisy grey image takes a tenth of the time.
    """
    if image.mode == "RGB":
        red, green, blue = image.split()
        if not any(ImageChops.difference(red, other).getbbox() for other in (green, blue)):
            image = red
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
