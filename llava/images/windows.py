"""Grey windows: which range of a scan's values becomes black to white."""

from collections.abc import Sequence

import numpy as np

from llava.errors import LlavaError
from llava.image_options import CT_WINDOWS
from llava.images.modes import scale_range

_PERCENTILES = (0.5, 99.5)
_MAX_COUNTED = 1 << 24


def read_window(window: str | Sequence[float]) -> tuple[float, float]:
    """(centre, width) of a preset's name or of a pair."""
    if isinstance(window, str):
        if window.lower() not in CT_WINDOWS:
            raise LlavaError(f"unknown window {window!r}; give centre and width, or one of {', '.join(CT_WINDOWS)}")
        return CT_WINDOWS[window.lower()]
    try:
        centre, width = (float(value) for value in window)
    except (TypeError, ValueError) as error:
        raise LlavaError("a window is a centre and a width, such as (40, 80)") from error
    if not width > 0:
        raise LlavaError(f"a window's width has to be above 0, not {width:g}")
    return centre, width


def apply_window(values: np.ndarray, window: tuple[float, float], function: str = "LINEAR") -> np.ndarray:
    """uint8 by one of DICOM's functions: LINEAR, LINEAR_EXACT or SIGMOID (PS3.3 C.11.2.1)."""
    centre, width = window
    if function == "SIGMOID":
        exponent = np.clip(-4 * (values.astype(np.float32) - centre) / width, -80, 80)
        return scale_range(1 / (1 + np.exp(exponent)), 0, 1)
    if function == "LINEAR_EXACT":
        return scale_range(values, centre - width / 2, centre + width / 2)
    if width <= 1:
        return np.where(values <= centre - 0.5, 0, 255).astype(np.uint8)
    return scale_range(values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)


def percentile_range(values: np.ndarray, ignore: np.ndarray | None = None) -> tuple[float, float]:
    """All but the darkest and brightest half percent of the finite values; the whole range where that is flat.

    `ignore` marks values that take no part in it (padding). (0, 0) without any value. Of more than 16 million
    values every n-th row counts.
    """
    step = max(1, -(-values.size // _MAX_COUNTED))
    values = values[::step]
    values = values[usable(values, None if ignore is None else ignore[::step])]
    if not values.size:
        return 0.0, 0.0
    low, high = np.percentile(values, _PERCENTILES)
    return (low, high) if high > low else (values.min(), values.max())


def value_range(values: np.ndarray, ignore: np.ndarray | None = None) -> tuple[float, float]:
    """The least and the largest of the values that are finite and not ignored."""
    values = values[usable(values, ignore)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def percentile_window(values: np.ndarray, ignore: np.ndarray | None = None) -> np.ndarray:
    """uint8; `percentile_range` spread over the whole range. What isn't finite, or is ignored, becomes black."""
    low, high = percentile_range(values, ignore)
    return scale_range(np.where(usable(values, ignore), values, low), low, high)


def usable(values: np.ndarray, ignore: np.ndarray | None = None) -> np.ndarray:
    """bool: which of the values are finite and not ignored."""
    return np.isfinite(values) if ignore is None else np.isfinite(values) & ~ignore
