"""Pillow's many pixel modes to 8-bit RGB, without the silent losses of `convert("RGB")`."""

import numpy as np
from PIL import Image

WHITE = (255, 255, 255)
_BIT_DEPTHS = (8, 10, 12, 14, 16)


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


def grey_to_rgb(grey: np.ndarray) -> Image.Image:
    """uint8 `[height, width]` to an RGB image with three equal channels."""
    return Image.fromarray(np.ascontiguousarray(grey, np.uint8)).convert("RGB")


def scale_grey(values: np.ndarray) -> np.ndarray:
    """Grey values of any depth `[height, width]` to uint8.

    Whole numbers are taken as 8, 10, 12, 14 or 16 bits, the least that holds the largest, so that images of
    one device keep their brightness. Floats from 0 to 1 are taken as such. Anything else goes by its range.
    """
    values = np.asarray(values)
    if np.issubdtype(values.dtype, np.floating):
        finite = np.isfinite(values)
        values = np.where(finite, values, values[finite].min() if finite.any() else 0)
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.floating):
        if low >= 0 and high <= 1:
            return scale_range(values, 0, 1)
    elif low >= 0 and high < 1 << _BIT_DEPTHS[-1]:
        depth = next(bits for bits in _BIT_DEPTHS if high < 1 << bits)
        return scale_range(values, 0, (1 << depth) - 1)
    return scale_range(values, low, high)


def scale_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` to 0, `high` to 255, linear between, clipped outside; uint8. A flat image is black."""
    span = float(high) - float(low)
    if span <= 0:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / span)
    return (np.clip(scaled, 0, 255) + 0.5).astype(np.uint8)
