"""What stands behind a file's first directory: pages, animations, EXIF, palettes in segments, tiles of slides."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from llava.images import ImageError, describe_image, open_image
from llava.images.headers.frames import count_frames
from llava.images.series import series_place, survey
from tests.security.hidden_bombs import (
    big_tiff,
    frames_in_dicom,
    gif_images,
    groups_in_dicom,
    image_tags,
    palette_image,
    palette_repeats,
)
from tests.security.image_bombs import tiff


def saved(kind: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new("RGB", (60, 40), "red")).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_is_turned_once_and_keeps_its_pixels(compression, big):
    image = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(40, 60, 3))
    exif = Image.Exif()
    exif[274] = 6
    exif.get_ifd(34665)[33434] = 1.0
    exif.get_ifd(34853)[1] = "N"
    content = saved("TIFF", image, exif=exif, compression=compression, big_tiff=big)
    shown = open_image(content)
    assert (np.asarray(shown) == np.asarray(image.transpose(Image.Transpose.ROTATE_270))).all()
    assert describe_image(content).orientation == "EXIF 6"


def test_a_tiff_is_turned_as_its_xmp_says_where_nothing_else_does():
    xmp = b'<x tiff:Orientation="6"/>'
    tags = [(700, 1, len(xmp), 8 + 64), *image_tags()]
    assert open_image(tiff(tags, bytes(32) + b"\xff" * 32 + xmp)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tiff([*tags, (274, 3, 1, 1)], bytes(32) + b"\xff" * 32 + xmp)).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("number", [256, 257, 277, 322])
def test_a_tiff_that_states_a_size_twice_is_refused(number):
    for content in (
        tiff([*image_tags(), (number, 4, 1, 8), (number, 4, 1, 8)], bytes(64)),
        big_tiff([*image_tags(16), (number, 4, 1, 8), (number, 4, 1, 8)], bytes(64)),
    ):
        with pytest.raises(ImageError, match=f"one size twice \\(tag {number}\\)"):
            open_image(content)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_frames_are_counted_as_pillow_counts_them(kind, frames):
    images = [Image.new("RGB", (8, 8), (40 * place, 10, 5)) for place in range(frames)]
    content = saved(kind, images[0], save_all=True, append_images=images[1:])
    with Image.open(io.BytesIO(content)) as image:
        assert count_frames(kind, content) == getattr(image, "n_frames", 1) == frames
    assert describe_image(content).frames == frames
    for end in range(0, len(content), 7):
        assert 1 <= count_frames(kind, content[: max(end, 16)]) <= frames


def test_an_image_beside_its_animation_is_counted():
    images = [Image.new("RGB", (8, 8), (40 * place, 10, 5)) for place in range(3)]
    content = saved("PNG", images[0], save_all=True, append_images=images[1:], default_image=True)
    with Image.open(io.BytesIO(content)) as image:
        assert count_frames("PNG", content) == image.n_frames == 3


def test_beyond_a_thousand_frames_it_is_said_that_there_are_more():
    facts = describe_image(gif_images())
    assert facts.frames == 1001 and "the first of more than 1,000 frames" in facts.shown


pydicom = pytest.importorskip("pydicom", reason="pydicom isn't installed (extra medical)")


def test_palettes_in_segments_are_pydicoms():
    segments = struct.pack("<5H", 0, 3, 0, 700, 65_535) + struct.pack("<3H", 1, 125, 9) + struct.pack("<4H", 2, 2, 0, 0)
    pixels = np.arange(0, 256, 4, np.uint8)
    content = palette_image(segments, pixels=pixels.tobytes())
    header = pydicom.dcmread(io.BytesIO(content))
    colours = pydicom.pixels.apply_color_lut(pixels.reshape(8, 8), header)
    assert np.abs(np.asarray(open_image(content)).astype(int) - colours / 257).max() <= 1


@pytest.mark.parametrize(
    "segments",
    [
        struct.pack("<3H", 0, 1, 5) + struct.pack("<3H", 1, 256, 5),  # one too many
        struct.pack("<3H", 0, 1, 5) + struct.pack("<4H", 2, 1, 3, 0),  # repeats itself
        struct.pack("<3H", 0, 1, 5) + struct.pack("<4H", 2, 1, 0, 0) * 300,
        struct.pack("<3H", 3, 1, 5),
        struct.pack("<3H", 0, 1, 5) + struct.pack("<4H", 2, 0, 11, 0) * 2 + struct.pack("<2H", 0, 0) * 9,
        struct.pack("<5H", 0, 1, 5, 2, 1),
        palette_repeats.__name__.encode(),
    ],
)
def test_a_palette_that_grows_or_is_none_is_refused(segments):
    with pytest.raises(ImageError, match="the DICOM header is damaged \\(a palette"):
        open_image(palette_image(segments))


def test_what_a_survey_may_not_read_is_left_out_with_the_reason(tmp_path):
    for make in (groups_in_dicom, frames_in_dicom):
        (tmp_path / f"{make.__name__}.dcm").write_bytes(make())
    reasons = {path.stem: reason for path, reason in survey(tmp_path).left_out}
    assert "more than 250,000 elements" in reasons["groups_in_dicom"]
    assert "4,000,000 frames can't be looked through" in reasons["frames_in_dicom"]
    with pytest.raises(ImageError, match="4,000,000 frames"):
        series_place(frames_in_dicom())


openslide = pytest.importorskip("openslide", reason="openslide isn't installed (extra slides)")


def directories(content: bytes, change) -> bytes:
    """A classic TIFF's directories written anew behind it; `change` gives the entries of each for its own."""
    whole, pointer, number = bytearray(content), 4, 0
    (place,) = struct.unpack_from("<L", content, 4)
    while place:
        (count,) = struct.unpack_from("<H", content, place)
        entries = [content[at : at + 12] for at in range(place + 2, place + 2 + 12 * count, 12)]
        (place,) = struct.unpack_from("<L", content, place + 2 + 12 * count)
        entries = change(number, entries)
        whole += bytes(len(whole) % 2)
        struct.pack_into("<L", whole, pointer, len(whole))
        whole += struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
        pointer, number = len(whole) - 4, number + 1
    return bytes(whole)


def is_tile(entry: bytes) -> bool:
    return entry[:2] in (struct.pack("<H", 322), struct.pack("<H", 323))


def with_tile(entry: bytes, size: int) -> bytes:
    return entry[:2] + struct.pack("<HLL", 4, 1, size)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    from tests.images.test_slides import pyramid

    path = tmp_path_factory.mktemp("slide") / "a.tif"
    return pyramid(path, [(200, 150), (100, 75), (50, 38)], side=32).read_bytes()


@pytest.mark.parametrize("name", ["a.tif", "a.svs", "a.NDPI"])
@pytest.mark.parametrize("size", [1 << 16, 1 << 20, (1 << 31) - 16])
@pytest.mark.parametrize("how", ["all", "second", "twice"])
def test_openslide_is_given_no_large_tiles_whatever_the_name_and_place(slide, tmp_path, name, size, how):
    def change(number, entries):
        if how == "second" and number == 0:
            return entries
        changed = [with_tile(entry, size) if is_tile(entry) else entry for entry in entries]
        if how != "twice" or number == 0:
            return changed if how != "twice" else entries
        both = zip(changed, entries, strict=True)
        return [one for new, old in both for one in ((new, old) if is_tile(old) else (old,))]

    path = tmp_path / name
    path.write_bytes(directories(slide, change))
    done = subprocess.run([sys.executable, "-m", "llava.images.info", str(path)], capture_output=True, text=True)
    assert done.returncode in (0, 2), done
    if not name.endswith(".tif"):
        assert done.returncode == 2 and "in tiles beyond 4096 × 4096" in done.stderr, done


def test_more_directories_than_a_slide_has_are_said(slide, tmp_path):
    content = bytearray(slide)
    (first,) = struct.unpack_from("<L", content, 4)
    (count,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<L", content, first + 2 + 12 * count, first)  # round and round
    (tmp_path / "a.svs").write_bytes(content)
    with pytest.raises(ImageError, match="more than 256 directories"):
        open_image(tmp_path / "a.svs")
    (tmp_path / "a.tif").write_bytes(content)
    assert open_image(tmp_path / "a.tif").size == (200, 150)


def test_a_dicom_file_is_no_slide_whatever_its_name(tmp_path):
    (tmp_path / "a.svs").write_bytes(palette_image(struct.pack("<3H", 3, 1, 5)))
    with pytest.raises(ImageError, match="palette"):
        open_image(tmp_path / "a.svs")
    (tmp_path / "cut.svs").write_bytes(b"II*\0\xff\xff\0\0")
    with pytest.raises(ImageError, match="the slide is damaged or cut off"):
        open_image(tmp_path / "cut.svs")


def test_hamamatsus_long_places_are_followed(slide, tmp_path):
    """Two directories in long places, of which the second one has the large tiles."""
    whole = bytearray(b"II*\0" + struct.pack("<Q", 16) + bytes(4))
    for following, tile in ((16 + 2 + 48 + 8, 256), (0, 1 << 20)):
        entries = [(256, 4, 1, 99), (322, 4, 1, tile), (323, 4, 1, tile), (65_420, 4, 1, 1)]
        whole += struct.pack("<H", 4) + b"".join(struct.pack("<HHLL", *entry) for entry in entries)
        whole += struct.pack("<Q", following)
    (tmp_path / "a.ndpi").write_bytes(whole)
    with pytest.raises(ImageError, match="in tiles beyond"):
        open_image(tmp_path / "a.ndpi")
