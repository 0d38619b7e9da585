"""Image files of each kind, for the fuzzer: sound ones in several forms, and how they are changed."""

import contextlib
import functools
import gzip
import io
import re
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from llava.images import ImageError, open_image
from tests.fuzz.harness import Target
from tests.fuzz.mutations import mutate

KINDS = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "DICOM", "NIFTI", "SLIDE")
_NOT_IN_TEXTS = re.compile(r"\n|0x[0-9a-f]{4}|\\x|BytesIO|<[a-z]|Unmistakable|4711|[\x00-\x08\x0e-\x1f\ufffd]")


def target(kind: str) -> Target:
    """How files of a kind are read and changed."""
    change = functools.partial(_changed, kind)
    files = [("", content) for content in originals(kind)]
    read = _read_slide if kind == "SLIDE" else lambda _, content: open_image(content)
    return Target(files, read, change, (ImageError,), _NOT_IN_TEXTS, _fault)


def _read_slide(_: str, content: bytes) -> Image.Image:
    """As a file: nobody sends a slide as bytes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("slide.tif").write_bytes(content)
        return open_image("slide.tif")


def _fault(result) -> str | None:
    if isinstance(result, Image.Image):
        return None if result.mode == "RGB" else f"opened as {result.mode}"
    return None if result.__cause__ is None else f"chained: {result!r}"


def _changed(kind: str, content: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    content = mutate(content, other, generator)
    if kind == "NIFTI" and generator.random() < 0.3:
        content = gzip.compress(content, 1)
    if kind == "PNG" and generator.random() < 0.8:
        content = _with_sums(content)
    return content


def originals(kind: str) -> list[bytes]:
    """Small sound files of a kind, in several of its forms."""
    generator = np.random.default_rng(11)
    colour = Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    grey16 = Image.fromarray(generator.integers(0, 4000, (40, 48)).astype(np.uint16))
    if kind == "DICOM":
        return _dicoms()
    if kind == "NIFTI":
        return _niftis(generator)
    if kind == "SLIDE":
        return _slides()
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = {
        "PNG": [(colour, {"exif": exif}), (colour.convert("RGBA"), {}), (colour.quantize(16), {}), (grey16, {})],
        "JPEG": [(colour, {"exif": exif}), (colour, {"progressive": True}), (colour.convert("CMYK"), {})],
        "TIFF": [
            *((colour, {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
            (grey16, {}),
        ],
        "GIF": [
            (colour.quantize(16), {"save_all": True, "append_images": [colour.quantize(8)], "comment": b"x" * 600})
        ],
        "WEBP": [(colour, {"exif": exif}), (colour, {"lossless": True}), (colour.convert("RGBA"), {})],
        "BMP": [(colour, {}), (colour.quantize(16), {}), (colour.convert("1"), {})],
        "PPM": [(colour, {}), (grey16.convert("I;16"), {})],
    }[kind]
    return [_saved(image, kind, options) for image, options in forms]


def _with_sums(png: bytes) -> bytes:
    """The chunks with right checksums, or a PNG decoder would look no further."""
    data, place = bytearray(png), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data)


def _saved(image: Image.Image, kind: str, options: dict) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _dicoms() -> list[bytes]:
    from pydicom.data import get_testdata_file

    from tests.images.test_dicom_files import enhanced
    from tests.images.test_medical import HOUNSFIELD, dicom

    names = (
        "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm",
        "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_small_odd_jpeg.dcm", "SC_rgb_small_odd.dcm", "JPEG-lossy.dcm",
    )  # fmt: skip
    found = [get_testdata_file(name, download=False) for name in names]
    made = [dicom(HOUNSFIELD, WindowCenter=40, WindowWidth=400, RescaleSlope=1, RescaleIntercept=-1024), enhanced()]
    return made + [Path(path).read_bytes() for path in found if path]


def _slides() -> list[bytes]:
    from tests.images.test_slides import pyramid

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        shapes = ([(200, 150), (100, 75), (50, 38)], [(90, 60), (45, 30)])
        return [pyramid(path, sizes, side=32).read_bytes() for sizes in shapes]


def _niftis(generator: np.random.Generator) -> list[bytes]:
    import nibabel

    values = generator.integers(0, 1000, (12, 10, 8)).astype(np.int16)
    affine = np.array([[0, -2, 0, 1], [1.5, 0, 0, 2], [0, 0, 3, 4], [0, 0, 0, 1.0]])
    return [
        nibabel.Nifti1Image(values, affine).to_bytes(),
        nibabel.Nifti1Image(values.astype(np.float32), np.diag([-1.0, 1, 1, 1])).to_bytes(),
        nibabel.Nifti2Image(values[..., None], np.eye(4)).to_bytes(),
        gzip.compress(nibabel.Nifti1Image(values, affine).to_bytes()),
    ]
