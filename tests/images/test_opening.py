"""What `open_image` makes of every kind of file, and of what isn't one."""

import base64
import contextlib
import io
import re
import struct
import unicodedata

import numpy as np
import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.images import Limits, open_image, open_uploaded_image, png_data_url
from llava.images.headers.frames import count_frames

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (32, 1))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source, **options) -> np.ndarray:
    image = open_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_lossless_formats_keep_every_pixel(format, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "image"  # found out by content, not by suffix
    path.write_bytes(encoded(Image.fromarray(image), format))
    np.testing.assert_array_equal(pixels(path), image)
    np.testing.assert_array_equal(pixels(str(path)), image)
    np.testing.assert_array_equal(pixels(path.read_bytes()), image)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [12, 16])
def test_16_bit_is_scaled_not_clipped(format, bits):
    top = (1 << bits) - 1
    ramp = np.tile(np.linspace(0, top, 256).astype(np.uint16), (8, 1))
    image = pixels(encoded(Image.fromarray(ramp), format))
    expected = ramp.astype(np.float64) / top * 255
    assert np.abs(image - expected[..., None]).max() <= 1
    assert len(np.unique(image)) == 256


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("interpretation", [0, 1], ids=["white is 0", "black is 0"])
def test_a_tiff_says_which_end_is_white(bits, interpretation):
    levels = np.array([[0, 2**16 - 1, 2**15]]) >> (16 - bits)
    content = levels.astype(f"<u{bits // 8}").tobytes()
    tags = {256: 3, 257: 1, 258: bits, 259: 1, 262: interpretation, 273: 8, 277: 1, 278: 1, 279: len(content)}
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHLL", tag, 4, 1, tags[tag]) for tag in tags)
    tiff = b"II*\0" + struct.pack("<L", 8 + len(content)) + content + directory + bytes(4)
    shown = pixels(tiff)[0, :, 0].astype(int)
    np.testing.assert_allclose(shown if interpretation else 255 - shown, [0, 255, 128], atol=1)


def test_16_bit_file_with_8_bit_values_keeps_them():
    assert (pixels(encoded(Image.fromarray(RAMP.astype(np.uint16))))[..., 0] == RAMP).all()


@pytest.mark.parametrize("scale", [1.0, 7000.0])
def test_float_tiff(scale):
    values = RAMP.astype(np.float32) / 255 * scale
    values[0, 0] = np.nan
    image = pixels(encoded(Image.fromarray(values), "TIFF"))
    assert np.abs(image[1:, :, 0].astype(int) - RAMP[1:]).max() <= 1


def test_32_bit_grey_with_negative_values_goes_by_its_range():
    image = pixels(encoded(Image.fromarray(RAMP.astype(np.int32) * 100 - 5000, "I"), "TIFF"))
    assert np.abs(image[..., 0].astype(int) - RAMP).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode):
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.paste((10, 20, 30, 255), (0, 0, 2, 4))
    expected = (10, 20, 30)
    if mode == "LA":
        image = image.convert("LA")
        expected = (image.getpixel((0, 0))[0],) * 3
    if mode == "P":
        image = image.quantize(8)
        data = encoded(image, "PNG", transparency=image.getpixel((3, 3)))
    else:
        data = encoded(image)
    opened = pixels(data)
    assert tuple(opened[0, 3]) == (255, 255, 255)
    assert np.abs(opened[0, 0].astype(int) - expected).max() <= 3


def test_cmyk_and_palette():
    rgb = Image.new("RGB", (16, 16), (250, 10, 10))
    assert np.abs(pixels(encoded(rgb.convert("CMYK"), "JPEG")).astype(int) - (250, 10, 10)).max() < 12
    assert np.abs(pixels(encoded(rgb.quantize(4))).astype(int) - (250, 10, 10)).max() < 4


def test_exif_data_that_points_beyond_any_file_is_left_out():
    big = b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**64 - 1)
    content = encoded(Image.new("RGB", (8, 4), "red"), "JPEG", exif=b"Exif\0\0" + big)
    assert open_image(content).size == (8, 4)
    assert count_frames("TIFF", big) == 1


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(image, "JPEG", exif=exif)).size == (20, 40)


def test_broken_exif_is_no_reason_to_refuse(shared_dir):
    data = encoded(Image.new("RGB", (40, 20), "red"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_image(data).size == (40, 20)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("blue", "red", "green")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data).astype(int) - (0, 0, 255)).max() < 8


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1)])
def test_extreme_shapes(size):
    assert open_image(encoded(Image.new("RGB", size))).size == size


def test_data_url():
    data = encoded(Image.fromarray(RAMP))
    text = base64.b64encode(data).decode()
    for url in (f"data:image/png;base64,{text}", f"DATA:image/png;name=x.png;base64,{text[:40]}\n{text[40:]}"):
        np.testing.assert_array_equal(pixels(url)[..., 0], RAMP)
    np.testing.assert_array_equal(np.asarray(open_uploaded_image(text))[..., 0], RAMP)
    np.testing.assert_array_equal(np.asarray(open_uploaded_image(data))[..., 0], RAMP)


@pytest.mark.timeout(60)
def test_a_data_url_that_is_none_is_refused_at_once():
    """A pattern that looks for its end from everywhere would take hours."""
    for url in ("data:" + "a" * 10**6, "data:image/png" + ";a=b" * 10**6, "data:a;" + "a" * 10**6):
        with pytest.raises(LlavaError, match="this one hasn't"):
            open_uploaded_image(url)


def test_pillow_image_of_any_mode():
    assert open_image(Image.fromarray(RAMP)).mode == "RGB"


def test_what_a_client_sends_is_never_a_path_or_an_address(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(Image.fromarray(RAMP)))
    for source in (str(path), f"file://{path}", "http://127.0.0.1/x.png", "https://example.org/x.png", "../x.png"):
        with pytest.raises(LlavaError):
            open_uploaded_image(source)
    with pytest.raises(LlavaError, match="data: URL"):
        open_uploaded_image(path)
    with pytest.raises(LlavaError, match="aren't fetched"):
        open_image("http://127.0.0.1/x.png")


BROKEN = {
    "empty": b"",
    "text": b"no image at all" * 20,
    "cut off": encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))[:2000],
    "signature only": b"\x89PNG\r\n\x1a\n",
    "jpeg start": b"\xff\xd8\xff\xe0" + b"\0" * 100,
    "gif": b"GIF89a" + b"\xff" * 20,
    "tiff": b"II*\0\xff\xff\xff\x7f" + b"\0" * 50,
    "gzip": b"\x1f\x8b\x08\0" + b"x" * 40,
    "dicom": b"\0" * 128 + b"DICM" + b"\xff" * 100,
    "nifti": b"\x5c\x01\0\0" + b"\xff" * 340 + b"n+1\0" + b"\0" * 8,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_content_is_one_clear_line_without_addresses(content):
    with pytest.raises(LlavaError) as caught:
        open_image(content)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("image")
    assert not re.search(r"0x[0-9a-f]+|BytesIO|<", text)


def test_broken_image_file_is_named(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(LlavaError, match=r"x\.jpg"):
        open_image(path)
    with pytest.raises(LlavaError, match=r"not found: .*y\.jpg"):
        open_image(tmp_path / "y.jpg")
    with pytest.raises(LlavaError, match="a folder"):
        open_image(tmp_path)
    with pytest.raises(LlavaError):
        open_image("x\0.png")


def test_flipped_bytes_never_raise_anything_else():
    """Every decoder error becomes a LlavaError (or the image still opens)."""
    generator = np.random.default_rng(3)
    noise = Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for format in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        data = encoded(noise, format)
        for _ in range(60):
            damaged = bytearray(data)
            for place in generator.integers(0, len(data), 4):
                damaged[place] = generator.integers(256)
            with contextlib.suppress(LlavaError):
                assert open_image(bytes(damaged)).mode == "RGB"


def test_pixel_cap_is_an_error_before_decoding():
    bomb = encoded(Image.new("1", (30_000, 30_000)))  # 110 KB that would become 2.7 GB
    assert len(bomb) < 200_000
    with pytest.raises(LlavaError, match="pixels"):
        open_image(bomb)
    with pytest.raises(LlavaError, match="64 × 32 pixels"):
        open_image(encoded(Image.fromarray(RAMP)), limits=Limits(max_pixels=1000))
    with pytest.raises(LlavaError):
        open_image(Image.fromarray(RAMP), limits=Limits(max_pixels=1000))


def test_caps_on_bytes_sides_and_shape(tmp_path):
    data = encoded(Image.fromarray(RAMP))
    path = tmp_path / "x.png"
    path.write_bytes(data)
    for source in (data, path, "data:image/png;base64," + base64.b64encode(data).decode()):
        with pytest.raises(LlavaError, match="MiB"):
            open_image(source, limits=Limits(max_bytes=20))
    with pytest.raises(LlavaError, match="per side"):
        open_image(data, limits=Limits(max_side=63))
    with pytest.raises(LlavaError, match="times as long"):
        open_image(encoded(Image.new("RGB", (1000, 1))), limits=Limits(max_aspect=100))


def test_formats_can_be_restricted():
    data = encoded(Image.fromarray(RAMP), "BMP")
    with pytest.raises(LlavaError, match="not an image"):
        open_image(data, limits=Limits(formats=("PNG", "JPEG")))
    for format in ("ICO", "EPS", "PCX", "SGI", "TGA", "JPEG2000"):
        with pytest.raises(LlavaError):
            open_image(encoded(Image.fromarray(RAMP), format))


@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_in_another_unicode_form_is_said(tmp_path, there, asked):
    """Of the folder as of the file, and of those alone that differ in nothing else."""
    path = tmp_path / unicodedata.normalize(there, "Kopf\u00fcber") / unicodedata.normalize(there, "r\u00f6.png")
    path.parent.mkdir()
    Image.new("RGB", (8, 8)).save(path)
    wanted = tmp_path / unicodedata.normalize(asked, f"{path.parent.name}/{path.name}")
    for other in (wanted, path.with_name(wanted.name)):
        with pytest.raises(LlavaError, match=r"; it is there under a name in another Unicode form .*: rename the file"):
            open_image(other)
    with pytest.raises(LlavaError, match=r"image not found: \S*a\S*png$"):
        open_image(wanted.with_name("ra\u0308.png"))


def test_a_data_url_loses_nothing_and_grey_is_one_channel():
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for values, channels in ((noise, 3), (noise[..., :1].repeat(3, 2), 1)):
        url = png_data_url(Image.fromarray(values))
        assert np.array_equal(pixels(url), values)
        assert len(url) * 3 / 4 == pytest.approx(40 * 50 * channels, rel=0.25)
