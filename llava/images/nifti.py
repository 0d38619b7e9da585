"""One slice of a NIfTI volume as RGB (extra "medical": nibabel).

The header is nibabel's; the voxels are read here, in one pass over the file and no further than the slice, so that
neither a compressed volume nor its extensions are ever in memory.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from llava.errors import ImageError, LlavaError, require
from llava.image_options import AXES
from llava.images.facts import ImageFacts
from llava.images.headers.inflating import GZIP, Unpacked, gunzip
from llava.images.headers.kinds import image_file
from llava.images.limits import Limits, plain_errors
from llava.images.modes import grey_to_rgb, in_bands
from llava.images.windows import apply_window, percentile_window, read_window, value_range

log = logging.getLogger(__name__)

_HEADERS = {348: 352, 540: 544}
"""Bytes of the header (NIfTI 1 and 2) and the least offset of the voxels after it."""
_COST = 4.0
"""Of a voxel of the slice against a pixel: it is scaled as a double."""
_DAMAGED = "damaged, or no NIfTI volume"
_UPRIGHT = {
    0: "head is up, front is left",
    1: "head is up, the patient's left is right",
    2: "front is up, the patient's left is right",
}
"""By axis."""


def read_nifti(
    file: BinaryIO,
    name: str,
    limits: Limits,
    *,
    index: int | None = None,
    axis: int = 2,
    window: str | tuple[float, float] | None = None,
) -> Image.Image:
    """A slice as RGB, turned as DICOM files commonly show a patient (`_UPRIGHT`).

    Args:
        file: at its begin; compressed or not.
        index: of the slice; the middle one by default. Of a time series the first volume is taken.
        axis: 0 sagittal, 1 coronal, 2 axial.
        window: (centre, width) or a CT preset's name; percentiles of the slice by default.

    Raises:
        ImageError: not NIfTI, a header and image in two files, beyond the limits, damaged.
        LlavaError: no such slice, axis or window.
    """
    with plain_errors(name, _DAMAGED):
        return _image(_cut(_Source(file, name, limits), index=index, axis=axis, window=window))


def read_and_describe_nifti(
    file: BinaryIO, name: str, limits: Limits, **options: Any
) -> tuple[Image.Image, ImageFacts]:
    """As `read_nifti`, and why it looks as it does."""
    with plain_errors(name, _DAMAGED):
        cut = _cut(_Source(file, name, limits), **options)
        return _image(cut), _facts(cut, is_asked=options.get("index") is not None)


def read_nifti_slices(
    path: Path,
    limits: Limits,
    indexes: Sequence[int],
    *,
    axis: int = 2,
    window: str | tuple[float, float] | None = None,
) -> Iterator[Image.Image | ImageError]:
    """As `read_nifti` of each of these slices, or why one can't be read; a volume that is packed is unpacked once.

    Raises:
        ImageError: the file can't be opened.
    """
    name = str(path)
    with (
        image_file(path) as file,
        plain_errors(name, _DAMAGED),
        closing(_Source(file, name, limits, keep=len(indexes) > 1)) as source,
    ):
        for index in indexes:
            try:
                with plain_errors(name, _DAMAGED):
                    source.skip_to(0)
                    image = _image(_cut(source, index=index, axis=axis, window=window))
            except ImageError as error:
                yield error
            else:
                yield image


def nifti_size(file: BinaryIO, name: str, limits: Limits, *, axis: int = 2) -> tuple[int, int]:
    """(width, height) of what `read_nifti` would show of any slice along the axis.

    Raises:
        ImageError: as `read_nifti`, but of damaged voxels.
    """
    nibabel = require("nibabel", "medical")
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    with plain_errors(name, _DAMAGED):
        source = _Source(file, name, limits)
        header = _read_header(nibabel, source)
        _check(header, source)
        sides = (*header.get_data_shape(), 1)[:3]
        canonical = nibabel.orientations.io_orientation(_affine(header, name))[:, 0].astype(int)
        # Of the two axes of RAS+ that are shown the first goes across.
        across, down = (sides[int(np.flatnonzero(canonical == one)[0])] for one in range(3) if one != axis)
        return across, down


class _Cut(NamedTuple):
    """A slice that was read."""

    header: Any
    values: np.ndarray
    """`[height, width]`, or `[height, width, 3]` of colours."""
    axis: int
    place: int
    slices: int
    """Of slices along the axis."""
    orientation: np.ndarray
    """Of each axis of the storage: (which one of RAS+ it is, 1 or -1)."""
    chosen: tuple[float, float] | None
    """The window that was asked for."""


def _cut(source: "_Source", *, index=None, axis=2, window=None) -> _Cut:
    nibabel = require("nibabel", "medical")
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    if axis not in (0, 1, 2):
        raise LlavaError(f"a volume's axis is 0 (sagittal), 1 (coronal) or 2 (axial), not {axis!r}")
    chosen = None if window is None else read_window(window)
    header = _read_header(nibabel, source)
    _check(header, source)
    orientation = nibabel.orientations.io_orientation(_affine(header, source.name)).astype(int)
    along = int(np.flatnonzero(orientation[:, 0] == axis)[0])
    count = (*header.get_data_shape(), 1)[:3][along]
    place = count // 2 if index is None else index
    if not 0 <= place < count:
        raise LlavaError(
            f"{source.name}: {AXES[axis]} slice {place} doesn't exist; there are {count} (0 to {count - 1})"
        )
    values = _slice(header, source, orientation, along, place)
    return _Cut(header, values, axis, place, count, orientation, chosen)


def _image(cut: _Cut) -> Image.Image:
    if cut.values.ndim == 3:
        return Image.fromarray(np.ascontiguousarray(cut.values))
    if cut.chosen is None:
        return grey_to_rgb(percentile_window(cut.values))
    return grey_to_rgb(in_bands(partial(apply_window, window=cut.chosen), cut.values))


def _facts(cut: _Cut, is_asked: bool) -> ImageFacts:
    header, chosen, plane = cut.header, cut.chosen, AXES[cut.axis]
    height, width = cut.values.shape[:2]
    codes = "".join(require("nibabel", "medical").orientations.ornt2axcodes(cut.orientation))
    stored = f"{header.get_data_dtype()}, {' × '.join(map(str, header.get_data_shape()))}, axes {codes}"
    values = value_range(cut.values) if cut.values.ndim == 2 else None
    facts = ImageFacts("NIfTI", width, height, cut.slices, cut.place, stored, chosen, values, plane, _spacing(cut))
    facts.shown.append(f"{plane} slice {cut.place} of {cut.slices}, {'as asked' if is_asked else 'the middle one'}")
    if max(header.get_data_shape()[3:], default=1) > 1:
        facts.shown.append("of the first volume of several")
    if values is None:
        facts.shown.append("its colours")
    elif chosen:
        facts.shown.append(f"window {chosen[0]:g}/{chosen[1]:g} (centre/width), as asked")
    else:
        facts.shown.append("grey from the 0.5th to the 99.5th percentile of the slice")
    facts.shown.append(f"turned upright: {_UPRIGHT[cut.axis]}")
    facts.note_proportions()
    return facts


def _spacing(cut: _Cut) -> tuple[float, ...]:
    """Millimetres between rows, columns and, of a volume, slices as they are shown."""
    millimetres = {"micron": 1e-3, "meter": 1e3}.get(cut.header.get_xyzt_units()[0], 1.0)
    sizes = dict(zip(cut.orientation[:, 0].tolist(), cut.header.get_zooms()))  # by axis of RAS+
    across, down = (axis for axis in range(3) if axis != cut.axis)
    return tuple(round(float(sizes[axis]) * millimetres, 6) for axis in (down, across, cut.axis) if axis in sizes)


class _Source:
    """The bytes of a volume from first to last, unpacked on the way; from anywhere where what is unpacked is kept."""

    def __init__(self, file: BinaryIO, name: str, limits: Limits, keep: bool = False):
        self.name, self.limits = name, limits
        self.is_packed = file.read(2) == GZIP
        self.size = file.seek(0, io.SEEK_END)
        limits.check_volume(self.size, name)
        file.seek(0)
        self.position = 0
        self.file: BinaryIO | Unpacked = Unpacked(file, name) if self.is_packed and keep else file
        self._pieces = gunzip(file, name) if self.is_packed and not keep else None
        self._rest = memoryview(b"")

    def close(self) -> None:
        self.file.close()

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0:
            part = self._next(size)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def skip_to(self, position: int) -> None:
        if self._pieces is None:
            self.file.seek(position)
            self.position = position
        while self.position < position:
            self._next(position - self.position)

    def _next(self, size: int) -> memoryview | bytes:
        """At most `size` bytes, at least one."""
        part: memoryview | bytes
        if self._pieces is None:
            part = self.file.read(size)
        else:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
            part, self._rest = self._rest[:size], self._rest[size:]
        if not part:
            raise ImageError(f"{self.name}: the volume is cut off")
        self.position += len(part)
        return part


def _read_header(nibabel, source: _Source):
    """nibabel's header, without the extensions after it: some are data sets of their own."""
    start = source.read(348)
    if start[344:348] == b"ni1\0" or start[4:8] == b"ni2\0":
        raise ImageError(f"{source.name}: a NIfTI header without its volume; give a single .nii or .nii.gz file")
    if start[4:8] == b"n+2\0":
        return nibabel.Nifti2Header.from_fileobj(io.BytesIO(start + source.read(540 - 348) + bytes(4)))
    return nibabel.Nifti1Header.from_fileobj(io.BytesIO(start + bytes(4)))


def _check(header, source: _Source) -> None:
    name, limits, shape = source.name, source.limits, header.get_data_shape()
    if not 2 <= len(shape) <= 7 or min(shape) < 1:
        raise ImageError(f"{name}: the volume's header says no usable shape, so there is no slice to show")
    size = int(np.prod(shape, dtype=np.float64)) * header.get_data_dtype().itemsize
    limits.check_volume(size, name)
    sides = (*shape, 1)[:3]
    for axis in range(3) if len(shape) > 2 else (2,):
        height, width = (side for place, side in enumerate(sides) if place != axis)
        limits.check_size(width, height, name, _COST)
    if not source.is_packed and source.size < _offset(header) + size:
        raise ImageError(f"{name}: the volume is cut off")


def _offset(header) -> int:
    """Where the voxels begin; some writers leave a zero there."""
    return max(int(header.get_data_offset()), _HEADERS[int(header["sizeof_hdr"])])


def _slice(header, source: _Source, orientation: np.ndarray, along: int, place: int) -> np.ndarray:
    """`[height, width]` after rescaling, or `[height, width, 3]` for colour: the slice `place`, counted as RAS+ goes,
    of the storage axis `along`."""
    shape = (*header.get_data_shape(), 1)[:3]
    index = place if orientation[along, 1] > 0 else shape[along] - 1 - place
    data = _scaled(header, _stored(header, source, shape, along, index))
    across = [axis for axis in range(3) if axis != along]
    for number, stored in enumerate(across):
        if orientation[stored, 1] < 0:
            data = np.flip(data, number)
    if orientation[across[0], 0] > orientation[across[1], 0]:
        data = data.swapaxes(0, 1)
    # The axes of RAS+ go to the patient's right, his front and his head: from the picture's right to its left, and up.
    return np.flip(data.swapaxes(0, 1), (0, 1))


def _affine(header, name: str) -> np.ndarray:
    """The header's first usable one: sform or qform as it says, then the other, then the voxels' sizes alone."""
    affines = [header.get_best_affine, header.get_qform, header.get_base_affine]
    for place, read in enumerate(affines):
        try:
            affine = read()
        except ValueError:  # nibabel's errors about a qform that is no rotation
            continue
        if np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3:
            if place:
                _warn_once(f"{name}: the affine has no direction for an axis; the next best orientation is used")
            return affine
    _warn_once(f"{name}: no usable orientation; it is taken to be stored in the order of RAS+")
    return np.eye(4)


@lru_cache(maxsize=1000)
def _warn_once(text: str) -> None:
    """A volume's header is read for its size, then for each slice."""
    log.warning("%s", text)


def _stored(header, source: _Source, shape: tuple[int, ...], along: int, index: int) -> np.ndarray:
    """The plane `index` of the storage axis `along`, `[first, second]` of the other two axes."""
    dtype = header.get_data_dtype()
    start, plane = _offset(header), shape[0] * shape[1] * dtype.itemsize
    end = start + plane * (index + 1 if along == 2 else shape[2])
    if source.is_packed or along != 2:
        source.limits.check_unpacked(end, source.name)
    if along == 2:
        source.skip_to(start + plane * index)
        return np.frombuffer(source.read(plane), dtype).reshape(shape[:2], order="F")
    source.skip_to(start)
    lines = np.empty((shape[1 - along], shape[2]), dtype)
    for place in range(shape[2]):
        values = np.frombuffer(source.read(plane), dtype).reshape(shape[:2], order="F")
        lines[:, place] = values[index] if along == 0 else values[:, index]
    return lines


def _scaled(header, stored: np.ndarray) -> np.ndarray:
    """Real values; colours as `[..., 3]` of uint8; the magnitude of complex numbers."""
    if stored.dtype.fields:
        return np.stack([stored[channel] for channel in "RGB"], -1).astype(np.uint8)
    slope, intercept = header.get_slope_inter()
    if slope is not None and (slope, intercept) != (1, 0):
        stored = stored * float(slope) + float(intercept or 0)
    return np.abs(stored) if np.iscomplexobj(stored) else stored
