"""One slice of a NIfTI volume as RGB (extra "medical": nibabel)."""

import logging
import struct
import zlib

import numpy as np
from PIL import Image

from llava.errors import LlavaError, require
from llava.images.limits import Limits
from llava.images.modes import grey_to_rgb
from llava.images.windows import apply_window, percentile_window, read_window

_AXES = ("sagittal", "coronal", "axial")
_GZIP = b"\x1f\x8b"


def read_nifti(
    content: bytes,
    name: str,
    limits: Limits,
    *,
    index: int | None = None,
    axis: int = 2,
    window: str | tuple[float, float] | None = None,
) -> Image.Image:
    """A slice as RGB, in RAS+ order turned upright: for an axial one front is up and the patient's left is right.

    Args:
        index: of the slice; the middle one by default. Of a time series the first volume is taken.
        axis: 0 sagittal, 1 coronal, 2 axial.
        window: (centre, width) or a CT preset's name; percentiles of the slice by default.

    Raises:
        LlavaError: not NIfTI, a header and image in two files, beyond the limits, damaged.
    """
    nibabel = require("nibabel", "medical")
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    if axis not in (0, 1, 2):
        raise LlavaError(f"a volume's axis is 0 (sagittal), 1 (coronal) or 2 (axial), not {axis!r}")
    chosen = None if window is None else read_window(window)
    content = _unpack(content, name, limits) if content[:2] == _GZIP else content
    if content[344:348] == b"ni1\0" or content[4:8] == b"ni2\0":
        raise LlavaError(f"{name}: a NIfTI header without its volume; give a single .nii or .nii.gz file")
    try:
        version2 = content[4:8] == b"n+2\0"
        volume = (nibabel.Nifti2Image if version2 else nibabel.Nifti1Image).from_bytes(content)
        _check(volume, name, limits)
        if len(content) < volume.dataobj.offset + np.prod(volume.shape) * volume.get_data_dtype().itemsize:
            raise LlavaError(f"{name}: the volume is cut off")
        slice_ = _slice(nibabel.as_closest_canonical(volume), index, axis, name)
    except (
        AttributeError,
        EOFError,
        IndexError,
        KeyError,
        OSError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
    ) as error:
        raise LlavaError(f"{name}: damaged, or no NIfTI volume ({type(error).__name__})") from error
    if slice_.ndim == 3:
        return Image.fromarray(np.ascontiguousarray(slice_))
    return grey_to_rgb(percentile_window(slice_) if chosen is None else apply_window(slice_, chosen))


def _unpack(content: bytes, name: str, limits: Limits) -> bytes:
    """Decompressed, at most as far as the limits go."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(content, limits.max_volume_bytes + 1)
    except zlib.error as error:
        raise LlavaError(f"{name}: damaged, or no NIfTI volume (not gzip)") from error
    limits.check_volume(len(unpacked), name)
    return unpacked


def _check(volume, name: str, limits: Limits) -> None:
    shape = volume.shape
    if not 2 <= len(shape) <= 5 or min(shape) < 1:
        raise LlavaError(f"{name}: a volume of the shape {tuple(shape)} has no slice to show")
    limits.check_volume(int(np.prod(shape, dtype=np.float64)) * volume.get_data_dtype().itemsize, name)
    sides = (*shape, 1)[:3]
    for axis in range(3):
        height, width = (side for place, side in enumerate(sides) if place != axis)
        limits.check_size(width, height, name) if len(shape) > 2 else limits.check_size(sides[0], sides[1], name)


def _slice(volume, index: int | None, axis: int, name: str) -> np.ndarray:
    """`[height, width]`, or `[height, width, 3]` for colour, read from the volume without the rest."""
    shape = (*volume.shape, 1)[:3]
    if index is None:
        index = shape[axis] // 2
    if not 0 <= index < shape[axis]:
        raise LlavaError(
            f"{name}: {_AXES[axis]} slice {index} doesn't exist; there are {shape[axis]} (0 to {shape[axis] - 1})"
        )
    places = [slice(None)] * 3 + [0] * (len(volume.shape) - 3)
    places[axis] = index
    data = np.asarray(volume.dataobj[tuple(places[: len(volume.shape)])])
    if data.dtype.fields:  # RGB24
        data = np.stack([data[channel] for channel in "RGB"], -1).astype(np.uint8)
    # From [right, up] of RAS+ to an image's rows from the top.
    return np.flip(data.swapaxes(0, 1), 0)
