"""The kind of an image file by its first bytes: DICOM, NIfTI or one of Pillow's (slides: llava.images.slides)."""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from llava.errors import ImageError
from llava.folders import other_form_note

_DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
_NIFTI_SUFFIXES = (".nii", ".nii.gz")
HEAD = 512
"""Bytes that tell the kind of a file."""


def image_kind(path: str | os.PathLike | bytes) -> str:
    """`dicom`, `nifti` or `image` (anything else), by a file's first bytes.

    Raises:
        ImageError: it can't be read.
    """
    if isinstance(path, bytes):
        return kind_of_head(path[:HEAD], "image")
    with image_file(Path(path)) as file:
        try:
            return kind_of_head(file.read(HEAD), str(path))
        except OSError as error:
            raise unreadable(path, error) from None


def image_file(path: Path) -> BinaryIO:
    """The image's file; a pipe, which may never hold anything, is none."""
    try:
        if not path.is_file():
            if path.is_dir():
                raise ImageError(f"{path}: a folder, not an image")
            raise ImageError(f"image not found: {path}{other_form_note([path])}")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def kind_of_head(head: bytes, name: str) -> str:
    """By content; by name only for what has no signature of its own."""
    lower = name.lower()
    if head[128:132] == b"DICM":
        return "dicom"
    if head[344:348] in (b"n+1\0", b"ni1\0") and head[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c"):
        return "nifti"
    if head[4:8] in (b"n+2\0", b"ni2\0") or lower.endswith(_NIFTI_SUFFIXES) or head[:2] == b"\x1f\x8b":
        return "nifti"
    return "dicom" if lower.endswith(_DICOM_SUFFIXES) or _is_bare_dicom(head) else "image"


def _is_bare_dicom(head: bytes) -> bool:
    """DICOM without preamble: it begins with an element of the group 2 or 8, as every old data set does."""
    if len(head) < 8 or head[:2] not in (b"\x02\0", b"\x08\0", b"\0\x08"):
        return False
    if head[4:6].isalpha() and head[4:6].isupper():
        return True
    # Without the type of the value: its length, which is that of a UID, a date or the group at most.
    return head[0] != 0 and struct.unpack("<L", head[4:8])[0] <= 64


def unreadable(name: Any, error: Exception) -> ImageError:
    return ImageError(f"{name}: the image can't be read ({getattr(error, 'strerror', None) or 'not a usable path'})")
