"""A DICOM file's pixels as RGB (extra "medical": pydicom). Text burnt into them stays there; a warning says so."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from llava.errors import ImageError, LlavaError, require
from llava.images.dicom_pixels import decode_frame
from llava.images.facts import ImageFacts, plane_of
from llava.images.headers.dicom_file import (
    DicomFile,
    damaged_header,
    read_dicom_file,
    transfer_syntax_name,
    whole_number,
)
from llava.images.headers.dicom_frames import frame_groups, geometry, grey_module, own_window
from llava.images.headers.palettes import check_palettes
from llava.images.limits import Limits, plain_errors
from llava.images.modes import grey_to_rgb, in_bands, scale_range
from llava.images.windows import apply_window, percentile_range, read_window, usable, value_range

log = logging.getLogger(__name__)

_MAX_PROFILE_PIXELS = 16_000_000


def read_dicom(
    content: bytes,
    name: str,
    limits: Limits,
    *,
    frame: int | None = None,
    window: str | tuple[float, float] | None = None,
) -> Image.Image:
    """One frame as RGB: modality LUT, then VOI LUT or window, inverted where low values are white.

    Args:
        frame: of a multi-frame file; the middle one by default.
        window: (centre, width) or a CT preset's name; by default the file's own, and the values' range
            without one.

    Raises:
        ImageError: not DICOM, no pixels (DICOMDIR, reports), beyond the limits, a compressed syntax without
            decoder (with the package to install), damaged.
        LlavaError: no such frame or window.
    """
    with _quiet() as pydicom:
        return _image(_read(pydicom, content, name, limits, frame=frame, window=window))


def read_and_describe_dicom(
    content: bytes, name: str, limits: Limits, **options: Any
) -> tuple[Image.Image, ImageFacts]:
    """As `read_dicom`, and why it looks as it does; no tag that could name a patient is read."""
    with _quiet() as pydicom:
        shown = _read(pydicom, content, name, limits, **options)
        return _image(shown), _facts(shown, is_asked=options.get("frame") is not None)


def dicom_size(content: bytes, name: str, limits: Limits) -> tuple[int, int]:
    """(width, height) of what `read_dicom` would show of any frame.

    Raises:
        ImageError: as `read_dicom`, but of damaged pixels.
    """
    with _quiet() as pydicom:
        header = read_dicom_file(pydicom, content, name, limits).header
        _check(header, name, limits)
        return int(header.Columns), int(header.Rows)


@contextmanager
def _quiet() -> Iterator[Any]:
    """pydicom, whose log and warnings quote the tags' values."""
    pydicom = require("pydicom", "medical")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pydicom


@dataclass(frozen=True)
class _Frame:
    """A frame that was decoded, and what its file says of it."""

    pydicom: Any
    file: DicomFile
    name: str
    frames: int
    index: int
    stored: np.ndarray
    """`[rows, columns]`, or `[rows, columns, 3]` of colours."""
    chosen: tuple[float, float] | None
    """The window that was asked for."""

    @property
    def is_rgb(self) -> bool:
        return self.stored.ndim == 3 and self.stored.shape[-1] == 3

    @property
    def has_palette(self) -> bool:
        return self.file.header.get("PhotometricInterpretation") == "PALETTE COLOR"

    @cached_property
    def groups(self) -> list:
        return frame_groups(self.pydicom, self.file, self.index)

    @cached_property
    def module(self) -> Any:
        return grey_module(self.pydicom, self.file, self.groups)


def _read(pydicom, content: bytes, name: str, limits: Limits, *, frame=None, window=None) -> _Frame:
    chosen = None if window is None else read_window(window)
    file = read_dicom_file(pydicom, content, name, limits)
    if _is_burnt_in(file.header):
        log.warning("a DICOM image says that it has text burnt into its pixels; it may name the patient")
    frames = _check(file.header, name, limits)
    index = _choose_frame(frame, frames, name)
    return _Frame(pydicom, file, name, frames, index, decode_frame(pydicom, file, index, frames, name, limits), chosen)


def _image(shown: _Frame) -> Image.Image:
    pydicom, header = shown.pydicom, shown.file.header
    with plain_errors(shown.name, "the DICOM file's grey or colour tables can't be applied"):
        if shown.chosen is not None and (shown.is_rgb or shown.has_palette):
            log.warning("a DICOM image is in colour; the window that was chosen isn't applied to it")
        if shown.is_rgb:
            return _colour(pydicom, shown.stored, header)
        if shown.has_palette:
            check_palettes(header, shown.name)
            return Image.fromarray(_palette(pydicom, shown.stored, header, shown.name))
        return grey_to_rgb(_grey(pydicom, shown.stored, header, shown.module, shown.chosen))


def _facts(shown: _Frame, is_asked: bool) -> ImageFacts:
    pydicom, header, frames, chosen = shown.pydicom, shown.file.header, shown.frames, shown.chosen
    with plain_errors(shown.name, "the DICOM header can't be read"):
        place = geometry(pydicom, shown.file, shown.groups)
        meaning = str(header.get("PhotometricInterpretation") or "unknown")
        facts = ImageFacts(
            "DICOM",
            int(header.Columns),
            int(header.Rows),
            frames,
            shown.index,
            f"{header.get('BitsStored') or header.get('BitsAllocated')} bits, {meaning}, "
            f"{transfer_syntax_name(shown.file.syntax)}",
            modality=_word(header.get("Modality")),
            spacing_mm=place.spacing_mm,
            position_mm=place.position_mm,
        )
        if place.directions is not None:
            facts.orientation = plane_of(*place.directions)
        if frames > 1:
            facts.shown.append(f"frame {shown.index} of {frames}, {'as asked' if is_asked else 'the middle one'}")
        if shown.is_rgb or shown.has_palette:
            facts.shown.append("its colours" if chosen is None else "its colours, to which no window applies")
        else:
            module = shown.module
            facts.window = chosen or (None if "VOILUTSequence" in module else own_window(module))
            some = shown.stored[:: max(1, shown.stored.size >> 24)]
            facts.values = value_range(_rescaled(pydicom, some, module), _is_padding(some, _padding(header)))
            facts.shown.append(_why(chosen, facts.window, "VOILUTSequence" in module))
            if _is_inverse(header):
                facts.shown.append(f"inverted, since low values are white ({meaning})")
            if _padding(header) is not None:
                facts.shown.append("padding is black")
        facts.note_proportions()
    if _is_burnt_in(header):
        facts.shown.append("the file says that text is burnt into its pixels; it stays there and may name the patient")
    return facts


def _is_burnt_in(header) -> bool:
    return str(header.get("BurnedInAnnotation", "")).upper() == "YES"


def _why(chosen: tuple[float, float] | None, window: tuple[float, float] | None, has_table: bool) -> str:
    if window is None:
        return "grey by the file's table" if has_table else "grey from the 0.5th to the 99.5th percentile of the values"
    whose = "as asked" if chosen else "the file's own"
    return f"window {window[0]:g}/{window[1]:g} (centre/width), {whose}"


def _word(value) -> str | None:
    """A code of DICOM's (CT, MR, …); None for anything longer or else."""
    text = str(value or "")
    return text if text.isalnum() and text.isupper() and len(text) <= 16 else None


def _check(header, name: str, limits: Limits) -> int:
    """The number of frames, once all sizes that the header states are within the limits."""
    rows, columns = (whole_number(header, keyword, name) for keyword in ("Rows", "Columns"))
    frames, samples = (whole_number(header, keyword, name, 1) for keyword in ("NumberOfFrames", "SamplesPerPixel"))
    bits = whole_number(header, "BitsAllocated", name)
    limits.check_size(columns, rows, name)
    if frames < 1 or bits not in (1, 8, 16, 32, 64) or samples not in (1, 3):
        raise damaged_header(
            name,
            f"NumberOfFrames is {frames:,}, SamplesPerPixel {samples:,}, BitsAllocated {bits:,}: one can't be",
        )
    limits.check_volume(rows * columns * frames * samples * bits // 8, name)
    return frames


def _choose_frame(frame: int | None, frames: int, name: str) -> int:
    if frame is None:
        return frames // 2
    if not 0 <= frame < frames:
        raise LlavaError(f"{name}: frame {frame} doesn't exist; the file has {frames} (0 to {frames - 1})")
    return frame


def _colour(pydicom, values: np.ndarray, header) -> Image.Image:
    """RGB (pydicom has converted YBR already); the colour profile applies to 8 bits only."""
    most = 8 * values.dtype.itemsize
    top = (1 << min(int(header.get("BitsStored") or most), most)) - 1
    if top != 255:
        return Image.fromarray(in_bands(lambda band: scale_range(band, 0, top), values))
    if header.get("ICCProfile"):
        try:
            values = _with_profile(pydicom, values, header)
        except (OSError, ValueError, ImportError, TypeError):
            log.warning("a DICOM image's colour profile can't be applied; its colours are used as they are")
    return Image.fromarray(np.ascontiguousarray(values))


def _with_profile(pydicom, values: np.ndarray, header) -> np.ndarray:
    # A chain of elements in a profile can be of any length, for each pixel.
    if values.size > 3 * _MAX_PROFILE_PIXELS or b"mpet" in header.ICCProfile:
        raise ValueError("too much work")
    return pydicom.pixels.apply_icc_profile(values.copy(), header)


def _palette(pydicom, values: np.ndarray, header, name: str) -> np.ndarray:
    """uint8 `[rows, columns, 3]`."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize > 2:
        raise ImageError(f"{name}: a DICOM palette for values of more than 16 bits isn't read")
    # A palette may take a while to be made, so it's made once: the colours of all values that there may be.
    least, most = np.iinfo(values.dtype).min, np.iinfo(values.dtype).max
    every = np.arange(least, most + 1).astype(values.dtype)
    colours = pydicom.pixels.apply_color_lut(every[np.newaxis], header)[0]
    if colours.dtype != np.uint8:
        colours = scale_range(colours, 0, np.iinfo(colours.dtype).max)
    colours = np.ascontiguousarray(colours[:, :3])
    return in_bands(lambda band: colours[band.astype(np.int32) - least], values)


def _grey(pydicom, values: np.ndarray, header, module, chosen: tuple[float, float] | None) -> np.ndarray:
    """uint8 `[rows, columns]`, dark to bright as a reader is meant to see it; padding is black."""
    window, function = chosen or own_window(module), "LINEAR"
    table = module.VOILUTSequence[0] if chosen is None and "VOILUTSequence" in module else None
    if chosen is None:
        function = str(module.get("VOILUTFunction") or "LINEAR").upper()
    is_inverse, padding = _is_inverse(header), _padding(header)
    is_ranged = table is None and window is None
    if is_ranged:
        # All that counts in a few rows at a time, or the largest images would take a gigabyte of doubles.
        step = max(1, values.size >> 24)
        some = values[::step]
        low, high = percentile_range(_rescaled(pydicom, some, module), _is_padding(some, padding))

    def show(band: np.ndarray) -> np.ndarray:
        is_padding = _is_padding(band, padding)
        real = _rescaled(pydicom, band, module)
        if table is not None:
            grey = scale_range(pydicom.pixels.apply_voi(real, module), 0, (1 << int(table.LUTDescriptor[2])) - 1)
        elif window is None:
            grey = scale_range(np.where(usable(real, is_padding), real, low), low, high)
        else:
            grey = apply_window(real, window, function)
        if is_inverse:
            grey = 255 - grey
        if is_padding is not None:
            grey[is_padding] = 0
        return grey

    return in_bands(show, values)


def _rescaled(pydicom, values: np.ndarray, module) -> np.ndarray:
    """Real values; a slope without a value is 1, an intercept 0."""
    if "ModalityLUTSequence" in module:
        return pydicom.pixels.apply_modality_lut(values, module)
    slope, intercept = module.get("RescaleSlope"), module.get("RescaleIntercept")
    slope, intercept = (1.0 if slope is None else float(slope)), float(intercept or 0)
    return values if (slope, intercept) == (1, 0) else values * slope + intercept


def _is_inverse(header) -> bool:
    """Whether low values are white."""
    return header.get("PhotometricInterpretation") == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"


def _padding(header) -> tuple[int, int] | None:
    """The least and the largest stored value that mean that there is no pixel."""
    value, other = header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")
    if not isinstance(value, int):
        return None
    other = other if isinstance(other, int) else value
    return min(value, other), max(value, other)


def _is_padding(values: np.ndarray, padding: tuple[int, int] | None) -> np.ndarray | None:
    return None if padding is None else (values >= padding[0]) & (values <= padding[1])
