"""The pixels of a DICOM file's frame as they are stored, compressed or not."""

import numpy as np

from llava.errors import ImageError
from llava.images.headers.codestreams import check_jpeg, check_jpeg2000, sample_bits, unpack_rle
from llava.images.headers.dicom_file import DicomFile, element_errors, transfer_syntax_name
from llava.images.limits import Limits, plain_errors

_NATIVE_COST, _YBR_COST, _RLE_COST = 1.0, 5.0, 2.0
"""Of a sample against a pixel of a plain JPEG."""
_DECODERS = {
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG": "pylibjpeg pylibjpeg-libjpeg",
}
"""Packages that decode a compressed transfer syntax, by what its name holds; the first match counts."""


def decode_frame(pydicom, file: DicomFile, index: int, frames: int, name: str, limits: Limits) -> np.ndarray:
    """Stored values `[rows, columns]` or `[rows, columns, 3]` of the frame `index` of `frames`; colours are RGB.

    Raises:
        ImageError: beyond the limits, a compressed syntax without decoder (with the package to install), damaged.
    """
    syntax = file.syntax
    with plain_errors(name, "the DICOM pixels are damaged, missing or cut off"):
        try:
            decoder = pydicom.pixels.get_decoder(syntax)
        except NotImplementedError:
            raise _no_decoder(syntax, name) from None
        if decoder.is_encapsulated and syntax != pydicom.uid.RLELossless and not decoder.is_available:
            raise _missing_decoder(syntax.name, name)
        _check_described(pydicom, file, name)
        options = pydicom.pixels.utils.as_pixel_options(
            file.header, transfer_syntax_uid=syntax, pixel_keyword=file.keyword, pixel_vr=file.vr or "OW"
        )
        is_ybr = str(options.get("photometric_interpretation", "")).startswith("YBR")
        samples = options.get("samples_per_pixel", 1)
        cost = (_YBR_COST if is_ybr else _NATIVE_COST) * samples / 3
        source: bytes | memoryview
        coded = None
        if decoder.is_encapsulated:
            frame = file.frame(pydicom, index, frames, name)
            options |= {"number_of_frames": 1}
            options.pop("extended_offsets", None)
            index = 0
            if syntax == pydicom.uid.RLELossless:
                limits.check_size(options["columns"], options["rows"], name, max(cost, _RLE_COST * samples / 3))
                source = _unpacked_rle(pydicom, frame, options, name)
                decoder = pydicom.pixels.get_decoder(pydicom.uid.ExplicitVRLittleEndian)
            else:
                coded = frame
                source = _checked(pydicom, frame, syntax, options, name, limits)
        else:
            limits.check_size(options["columns"], options["rows"], name, cost)
            source = pixels = file.pixels()
            _check_length(pixels, options, frames, name)
        low = _low_bits(file, options, coded, name)
        if low:  # pydicom takes the lowest bits for the stored ones
            options["bits_stored"] += low
        try:
            values = np.asarray(decoder.as_array(source, index=index, view_only=decoder.is_native, **options)[0])
            return values >> low if low else values
        except RuntimeError:
            # Pillow, which is always there, decodes some of a syntax's images only.
            if decoder.is_encapsulated and "pylibjpeg" not in decoder.available_plugins:
                raise _missing_decoder(syntax.name, name) from None
            raise


def _check_described(pydicom, file: DicomFile, name: str) -> None:
    """That the elements without which no pixels can be decoded have a value."""
    for keyword in ("SamplesPerPixel", "BitsStored", "PixelRepresentation") if file.keyword == "PixelData" else ():
        with element_errors(keyword, name):
            int(file.header[keyword].value)
    with element_errors("PhotometricInterpretation", name):
        pydicom.pixels.common.PhotometricInterpretation(file.header.PhotometricInterpretation)


def _checked(pydicom, frame: bytes, syntax, options: dict, name: str, limits: Limits) -> bytes:
    """A compressed frame whose own size is the header's, alone in its capsule."""
    if syntax in (*pydicom.uid.JPEG2000TransferSyntaxes, *_high_throughput(pydicom)):
        frame = check_jpeg2000(frame, options["rows"], options["columns"], name, limits)
    elif syntax in (*pydicom.uid.JPEGTransferSyntaxes, *pydicom.uid.JPEGLSTransferSyntaxes):
        frame = check_jpeg(frame, options["rows"], options["columns"], name, limits)
    else:
        raise _no_decoder(syntax, name)
    return pydicom.encaps.encapsulate([frame], has_bot=False)


def _low_bits(file: DicomFile, options: dict, coded: bytes | None, name: str) -> int:
    """How many bits of a sample lie below those that count.

    HighBit says where these end; PS3.5 8.1.1 wants none below them only since 2014. A frame that is `coded` (JPEG and
    its kin) has the bits below where its own samples have so many.
    """
    high, stored = file.header.get("HighBit"), options.get("bits_stored")
    if file.keyword != "PixelData" or not isinstance(high, int) or not isinstance(stored, int):
        return 0
    if not 0 < stored <= high:
        return 0
    bits = options["bits_allocated"] if coded is None else sample_bits(coded, name)
    return high + 1 - stored if high < bits else 0


def _high_throughput(pydicom) -> tuple:
    return pydicom.uid.HTJ2KLossless, pydicom.uid.HTJ2KLosslessRPCL, pydicom.uid.HTJ2K


def _unpacked_rle(pydicom, frame: bytes, options: dict, name: str) -> bytes:
    samples, bits = options.get("samples_per_pixel", 1), options["bits_allocated"]
    # Its planes are whole, also where the header says that colours are shared by neighbours.
    if options.get("photometric_interpretation") == "YBR_FULL_422":
        options["photometric_interpretation"] = "YBR_FULL"
    options |= {"transfer_syntax_uid": pydicom.uid.ExplicitVRLittleEndian, "planar_configuration": 1}
    return unpack_rle(frame, options["rows"], options["columns"], samples, bits, name)


def _check_length(pixels: memoryview, options: dict, frames: int, name: str) -> None:
    """Of uncompressed pixels that share their colours: whole colours under that name would be read as noise."""
    if options.get("photometric_interpretation") == "YBR_FULL_422":
        size = options["rows"] * options["columns"] * options["bits_allocated"] // 8 * frames
        if len(pixels) >= 3 * size:
            raise ImageError(
                f"{name}: the DICOM header says YBR_FULL_422, but the pixels hold whole colours "
                f"({len(pixels):,} bytes, not {2 * size:,}); correct PhotometricInterpretation to RGB or YBR_FULL"
            )


def _no_decoder(syntax, name: str) -> ImageError:
    return ImageError(
        f"{name}: no decoder for the DICOM transfer syntax {transfer_syntax_name(syntax)}; convert the file, or export "
        f"a frame of it as PNG"
    )


def _missing_decoder(syntax: str, name: str) -> ImageError:
    packages = next(packages for part, packages in _DECODERS.items() if part in syntax)
    return ImageError(f"{name}: compressed as {syntax}; to read it, pip install {packages}")
