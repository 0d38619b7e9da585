"""A DICOM file's pixels as RGB (extra "medical": pydicom).

Only the tags that describe pixels are read at all: no patient's name, number or date can reach a log or an
error, because none is ever parsed. Text burnt into the pixels stays there (a warning says when the file
admits it).
"""

import io
import logging
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from llava.errors import LlavaError, require
from llava.images.limits import Limits
from llava.images.modes import grey_to_rgb, scale_range
from llava.images.windows import apply_window, percentile_window, read_window

log = logging.getLogger(__name__)

_PIXEL_TAGS = (
    "SOPClassUID",
    "Modality",
    "BurnedInAnnotation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "PresentationLUTShape",
    "PixelPaddingValue",
    "ICCProfile",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
    "PaletteColorLookupTableUID",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
_DICOMDIR = "1.2.840.10008.1.3.10"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_DECODERS = {
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "HTJ2K": "pylibjpeg pylibjpeg-openjpeg",
    "High-Throughput": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG-LS": "pyjpegls",
    "JPEG": "pylibjpeg pylibjpeg-libjpeg",
    "RLE": "pylibjpeg pylibjpeg-rle",
}
"""Packages that decode a compressed transfer syntax, by what its name holds; the first match counts."""

_BROKEN = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What pydicom and its decoders raise on broken or hostile files; their texts can hold values of tags."""


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
        LlavaError: not DICOM, no pixels (DICOMDIR, reports), beyond the limits, a compressed syntax without
            decoder (with the package to install), damaged.
    """
    pydicom = require("pydicom", "medical")
    # Its log quotes the tags' values.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    chosen = None if window is None else read_window(window)
    if _DEFLATED in content[132:4096]:
        # Deflated whole: its size is only known once it is unpacked.
        raise LlavaError(f"{name}: deflated DICOM isn't read; convert it to an uncompressed one (dcmconv +te)")
    with warnings.catch_warnings():
        # Warnings quote the tags' values.
        warnings.simplefilter("ignore")
        header = _read_header(pydicom, content, name)
        frames = _check(header, name, limits)
        index = _choose_frame(frame, frames, name)
        values = _decode(pydicom, content, header, index, name)
        try:
            if values.ndim == 3 and values.shape[-1] == 3:
                return _colour(pydicom, values, header)
            if header.get("PhotometricInterpretation") == "PALETTE COLOR":
                return _palette(pydicom, values, header)
            return grey_to_rgb(_grey(pydicom, values, header, index, chosen))
        except _BROKEN as error:
            raise LlavaError(
                f"{name}: the DICOM file's grey or colour tables can't be applied ({type(error).__name__})"
            ) from error


def _read_header(pydicom, content: bytes, name: str):
    """The tags about pixels, without the pixels."""
    try:
        header = pydicom.dcmread(
            io.BytesIO(content), stop_before_pixels=True, force=True, specific_tags=list(_PIXEL_TAGS)
        )
        if header.get("SOPClassUID") == _DICOMDIR or header.file_meta.get("MediaStorageSOPClassUID") == _DICOMDIR:
            raise LlavaError(f"{name}: a DICOMDIR is an index, not an image; give one of the files it lists")
        if "Rows" not in header or "Columns" not in header:
            raise LlavaError(f"{name}: a DICOM file without an image, or no DICOM file at all")
    except _BROKEN as error:
        raise LlavaError(f"{name}: the DICOM header is damaged ({type(error).__name__})") from error
    if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        log.warning("a DICOM image says that it has text burnt into its pixels; it may name the patient")
    return header


def _check(header, name: str, limits: Limits) -> int:
    """The number of frames, once all sizes that the header states are within the limits."""
    try:
        rows, columns = int(header.Rows), int(header.Columns)
        frames = int(header.get("NumberOfFrames") or 1)
        samples, bits = int(header.get("SamplesPerPixel") or 1), int(header.get("BitsAllocated") or 0)
    except _BROKEN as error:
        raise LlavaError(f"{name}: the DICOM header states no usable size") from error
    limits.check_size(columns, rows, name)
    if frames < 1 or bits not in (1, 8, 16, 32, 64) or samples not in (1, 3):
        raise LlavaError(f"{name}: the DICOM header is wrong ({frames} frames, {samples} samples of {bits} bits)")
    limits.check_volume(rows * columns * frames * samples * bits // 8, name)
    return frames


def _choose_frame(frame: int | None, frames: int, name: str) -> int:
    if frame is None:
        return frames // 2
    if not 0 <= frame < frames:
        raise LlavaError(f"{name}: frame {frame} doesn't exist; the file has {frames} (0 to {frames - 1})")
    return frame


def _decode(pydicom, content: bytes, header, index: int, name: str) -> np.ndarray:
    """Stored values `[rows, columns]` or `[rows, columns, 3]` of one frame."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        syntax = pydicom.uid.ImplicitVRLittleEndian if header.is_implicit_VR else pydicom.uid.ExplicitVRLittleEndian
    try:
        decoder = pydicom.pixels.get_decoder(syntax) if syntax.is_compressed else None
        if decoder is not None and not decoder.is_available:
            raise LlavaError(_missing_decoder(syntax.name, name))
        source = io.BytesIO(content)
        if "TransferSyntaxUID" not in header.file_meta:
            source = pydicom.dcmread(source, force=True, specific_tags=[*_PIXEL_TAGS, "PixelData"])
            source.file_meta.TransferSyntaxUID = syntax
        return np.asarray(pydicom.pixels.pixel_array(source, index=index))
    except MemoryError as error:
        raise LlavaError(f"{name}: the image needs more memory than there is") from error
    except _BROKEN as error:
        if getattr(syntax, "is_private", False) or isinstance(error, NotImplementedError):
            raise LlavaError(f"{name}: no decoder for the DICOM transfer syntax {syntax}") from error
        raise LlavaError(
            f"{name}: the DICOM pixels are damaged, missing or cut off ({type(error).__name__})"
        ) from error


def _missing_decoder(syntax: str, name: str) -> str:
    packages = next((packages for part, packages in _DECODERS.items() if part in syntax), "python-gdcm")
    return f"{name}: compressed as {syntax}; to read it, pip install {packages} (or python-gdcm)"


def _colour(pydicom, values: np.ndarray, header) -> Image.Image:
    """RGB (pydicom has converted YBR already); the colour profile applies to 8 bits only."""
    if values.dtype != np.uint8:
        top = (1 << int(header.get("BitsStored") or 8 * values.dtype.itemsize)) - 1
        return Image.fromarray(scale_range(values, 0, top))
    if "ICCProfile" in header:
        try:
            values = pydicom.pixels.apply_icc_profile(values.copy(), header)
        except (OSError, ValueError, ImportError, TypeError):
            log.warning("a DICOM image's colour profile can't be applied; its colours are used as they are")
    return Image.fromarray(np.ascontiguousarray(values))


def _palette(pydicom, values: np.ndarray, header) -> Image.Image:
    colours = pydicom.pixels.apply_color_lut(values, header)
    if colours.dtype != np.uint8:
        colours = scale_range(colours, 0, np.iinfo(colours.dtype).max)
    return Image.fromarray(np.ascontiguousarray(colours[..., :3]))


def _grey(pydicom, values: np.ndarray, header, index: int, chosen: tuple[float, float] | None) -> np.ndarray:
    """uint8 `[rows, columns]`, dark to bright as a reader is meant to see it."""
    module = _grey_module(pydicom, header, index)
    is_padding = values == header.PixelPaddingValue if "PixelPaddingValue" in header else None
    values = pydicom.pixels.apply_modality_lut(values, module)
    own = _own_window(module)
    if chosen is not None:
        grey = apply_window(values, chosen)
    elif "VOILUTSequence" in module:
        bits = int(module.VOILUTSequence[0].LUTDescriptor[2])
        grey = scale_range(pydicom.pixels.apply_voi(values, module), 0, (1 << bits) - 1)
    elif own is not None:
        grey = apply_window(values, own, str(module.get("VOILUTFunction") or "LINEAR").upper())
    else:
        grey = percentile_window(values, is_padding)
    is_inverse = header.get("PhotometricInterpretation") == "MONOCHROME1"
    return 255 - grey if is_inverse or header.get("PresentationLUTShape") == "INVERSE" else grey


def _grey_module(pydicom, header, index: int):
    """Rescale and window of frame `index`: in multi-frame files of the newer kind they stand in its group."""
    groups = [
        sequence[place]
        for sequence, place in (
            (header.get("SharedFunctionalGroupsSequence"), 0),
            (header.get("PerFrameFunctionalGroupsSequence"), index),
        )
        if sequence and place < len(sequence)
    ]
    module = pydicom.Dataset()
    module.file_meta = header.file_meta
    module.set_original_encoding(*header.original_encoding)
    module.update({element.tag: element for element in header if element.tag.group == 0x0028})
    for group in groups:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if group.get(name):
                module.update({element.tag: element for element in group[name].value[0]})
    return module


def _own_window(module) -> tuple[float, float] | None:
    """The file's first window, if it has a usable one."""
    if module.get("WindowCenter") is None or module.get("WindowWidth") is None:
        return None
    centre, width = np.atleast_1d(module.WindowCenter), np.atleast_1d(module.WindowWidth)
    if not len(centre) or not len(width) or not float(width[0]) > 0:
        return None
    return float(centre[0]), float(width[0])
