"""The size of an image by its header is that of what is shown, of any kind of file, and no pixel is read for it."""

import io
from itertools import permutations, product

import numpy as np
import pytest
from PIL import Image, ImageFile

from llava.errors import ImageError
from llava.images import ImageOptions, ImageProcessor, ImageWithOptions, image_size, open_image, png_data_url

KINDS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM")


def encoded(kind: str, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (40, 24), "red").save(buffer, kind, **({"exif": exif} if orientation > 1 else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_of_any_kind_of_picture_without_its_pixels(tmp_path, monkeypatch, kind):
    path = tmp_path / "image"
    path.write_bytes(encoded(kind))
    shown = open_image(path)
    assert shown.size == (40, 24)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were read"))
    assert image_size(path) == image_size(encoded(kind)) == image_size(png_data_url(shown)) == shown.size


@pytest.mark.parametrize(("kind", "orientation"), product(("JPEG", "PNG", "TIFF", "WEBP"), range(1, 9)))
def test_turned_upright(kind, orientation):
    content = encoded(kind, orientation)
    assert image_size(content) == open_image(content).size == ((24, 40) if orientation > 4 else (40, 24))


def test_of_no_image_and_beyond_the_limits():
    for content in (b"", b"not an image", encoded("PNG").replace(b"\0\0\0\x28\0\0\0\x18", b"\0\7\0\0\0\0\0\x18")):
        with pytest.raises(ImageError) as opened:
            open_image(content)
        with pytest.raises(ImageError) as asked:
            image_size(content)
        assert str(asked.value) == str(opened.value)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", permutations(range(3)))
def test_of_a_slice_of_a_volume_however_it_is_stored(axis, order):
    nibabel = pytest.importorskip("nibabel")
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[list(order)] * (1, -1, 1)
    content = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine).to_bytes()
    image = ImageWithOptions(content, ImageOptions(axis=axis))
    assert image_size(image) == open_image(image).size


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "SC_rgb_rle.dcm"])
def test_of_dicom_files(name):
    path = pytest.importorskip("pydicom.data").get_testdata_file(name, download=False)
    assert path is not None and image_size(path) == open_image(path).size


@pytest.mark.parametrize("pinpoints", [None, [[28, 56], [56, 28], [84, 84]], "[(30, 56), (100, 29)]"])
def test_tiles_are_counted_by_the_size(pinpoints):
    processor = ImageProcessor.from_config({"size": 28, "crop_size": 28})
    for width, height in product((1, 27, 56, 90, 400), repeat=2):
        (tiles,) = processor([Image.new("RGB", (width, height))], "anyres", pinpoints)
        assert processor.count_tiles(width, height, pinpoints) == len(tiles)
