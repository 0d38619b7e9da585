"""`open_image`: a file, bytes, a data URL or a Pillow image as RGB; DICOM and NIfTI too.

Error texts are our own words: a decoder's can hold memory addresses or a patient's data.
"""

import base64
import binascii
import io
import os
import re
import struct
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from llava.errors import LlavaError
from llava.images.limits import UPLOAD_LIMITS, Limits
from llava.images.modes import to_rgb

_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
_WEB_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
_NIFTI_SUFFIXES = (".nii", ".nii.gz")


def open_image(
    source: str | os.PathLike | bytes | Image.Image,
    *,
    limits: Limits | None = None,
    frame: int | None = None,
    window: str | tuple[float, float] | None = None,
    axis: int = 2,
    draft: int | None = None,
) -> Image.Image:
    """Open an image as RGB (mode "RGB", upright by its EXIF orientation, first frame of an animation).

    Args:
        source: path, file content, `data:` URL, or a Pillow image.
        limits: caps on size; `Limits()` by default.
        frame: of a multi-frame DICOM, or the slice of a volume; the middle one by default.
        window: for DICOM and NIfTI, (centre, width) or a CT preset's name (`llava.images.windows`).
        axis: of a volume, along which slices are counted: 0 sagittal, 1 coronal, 2 axial.
        draft: decode a JPEG at a half, a quarter or an eighth of its size, as long as both sides have so many pixels:
            faster, and the pixels differ a little from those of the whole image made smaller.

    Raises:
        LlavaError: missing file, unknown or broken content, an image beyond the limits, an address of the
            web (nothing is fetched), a missing extra for DICOM or NIfTI.
    """
    limits = limits or Limits()
    if isinstance(source, Image.Image):
        limits.check_size(*source.size, "image")
        return to_rgb(_upright(source))
    content, name = _read(source, limits)
    kind = _kind(content, name)
    if kind == "dicom":
        from llava.images.dicom import read_dicom

        return read_dicom(content, name, limits, frame=frame, window=window)
    if kind == "nifti":
        from llava.images.nifti import read_nifti

        return read_nifti(content, name, limits, index=frame, axis=axis, window=window)
    return _decode(content, name, limits, draft)


def open_uploaded_image(source: bytes | str, *, limits: Limits = UPLOAD_LIMITS, **options: Any) -> Image.Image:
    """As `open_image` for what a client sent: bytes, a `data:` URL or bare base64, never a path or an address."""
    if isinstance(source, str):
        source = _from_base64(source, limits)
    elif not isinstance(source, (bytes, bytearray, memoryview)):
        raise LlavaError("an image has to be sent as a data: URL or as base64")
    return open_image(bytes(source), limits=limits, **options)


def _read(source: Any, limits: Limits) -> tuple[bytes, str]:
    """(content, name for messages) of a path, bytes or data URL."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        content, name = bytes(source), "image"
        limits.check_bytes(len(content), name)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        content, name = _from_base64(source, limits), "image"
    elif isinstance(source, str) and _WEB_ADDRESS.match(source):
        raise LlavaError("images aren't fetched from the web; download it and give the file, or a data: URL")
    elif isinstance(source, (str, os.PathLike)):
        content, name = _read_file(Path(source).expanduser(), limits), str(source)
    else:
        raise LlavaError(f"an image is a path, bytes, a data: URL or a Pillow image, not {type(source).__name__}")
    if not content:
        raise LlavaError(f"{name}: the image is empty (0 bytes)")
    return content, name


def _read_file(path: Path, limits: Limits) -> bytes:
    try:
        if not path.is_file():
            raise LlavaError(f"image not found: {path}" if not path.is_dir() else f"{path}: a folder, not an image")
        limits.check_bytes(path.stat().st_size, str(path))
        with path.open("rb") as file:
            # The size may have changed since: never read more than one byte beyond the cap.
            content = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        raise LlavaError(f"{path}: the image can't be read ({reason})") from error
    limits.check_bytes(len(content), str(path))
    return content


def _from_base64(text: str, limits: Limits) -> bytes:
    start = 0
    if text[:5].lower() == "data:":
        match = _DATA_URL.match(text)
        if match is None:
            raise LlavaError("a data: URL of an image has the form data:image/png;base64,…; this one hasn't")
        start = match.end()
    elif _WEB_ADDRESS.match(text):
        raise LlavaError("images aren't fetched from the web; send a data: URL or base64")
    limits.check_bytes((len(text) - start) * 3 // 4 - 2, "image")
    try:
        content = base64.b64decode("".join(text[start:].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise LlavaError("the image isn't valid base64") from error
    if not content:
        raise LlavaError("the image is empty (0 bytes)")
    return content


def _kind(content: bytes, name: str) -> str:
    """By content; by name only for what has no signature of its own (DICOM without preamble, gzip)."""
    lower = name.lower()
    if content[128:132] == b"DICM":
        return "dicom"
    if content[344:348] in (b"n+1\0", b"ni1\0") and struct.unpack("<i", content[:4])[0] in (348, 348 << 24):
        return "nifti"
    if content[4:8] in (b"n+2\0", b"ni2\0") or lower.endswith(_NIFTI_SUFFIXES) or content[:2] == b"\x1f\x8b":
        return "nifti"
    return "dicom" if lower.endswith(_DICOM_SUFFIXES) else "image"


def _decode(content: bytes, name: str, limits: Limits, draft: int | None = None) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=limits.formats) as image:
            limits.check_size(*image.size, name)
            if draft is not None:
                image.draft(None, (draft, draft))
            image.load()
            return to_rgb(_upright(image))
    except UnidentifiedImageError as error:
        known = ", ".join(limits.formats)
        raise LlavaError(f"{name}: not an image that can be read (known: {known}, DICOM, NIfTI)") from error
    except Image.DecompressionBombError as error:
        raise LlavaError(f"{name}: more pixels than an image may have ({limits.max_pixels:,})") from error
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error) as error:
        # What Pillow's decoders raise on broken files; LlavaError is none of them.
        raise LlavaError(f"{name}: the image is damaged or cut off ({type(error).__name__})") from error
    except (MemoryError, OverflowError, ArithmeticError) as error:
        raise LlavaError(f"{name}: the image needs more memory than there is") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; broken EXIF data is no reason to refuse an image."""
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return image


def png_data_url(image: Image.Image) -> str:
    """The image without loss as a data: URL, which every OpenAI-compatible server and browser can read."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
