"""Whole-slide images: a smaller level is shown, never the full size; the extra is named; nothing of a label."""

import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.image_options import ImageOptions
from llava.images import ImageError, Limits, describe_image, open_image, with_default_options
from llava.images.info import main as info

openslide = pytest.importorskip("openslide", reason="openslide isn't installed (extra slides)")

TILE = 256
COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 90, 90)]


def pyramid(path, sizes, secret=b"Unmistakable^Person", side=TILE):
    """A TIFF in tiles: a directory for each (width, height), each filled with a colour of its own."""
    data = bytearray(b"II*\0" + bytes(4))
    pointer = 4
    for level, (width, height) in enumerate(sizes):
        count = -(-width // side) * -(-height // side)
        tile = np.full((side, side, 3), COLOURS[level], np.uint8).tobytes()
        first = len(data)
        data += tile  # all tiles are alike: one serves them all
        bits, offsets, counts = len(data), len(data) + 6, len(data) + 6 + 4 * count
        data += struct.pack("<3H", 8, 8, 8) + struct.pack(f"<{count}L", *[first] * count)
        data += struct.pack(f"<{count}L", *[len(tile)] * count)
        text = len(data)
        data += secret + b"\0" * (2 - len(secret) % 2)
        tags = [
            (254, 4, 1, int(level > 0)), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits), (259, 3, 1, 1),
            (262, 3, 1, 2), (270, 2, len(secret) + 1, text), (277, 3, 1, 3), (284, 3, 1, 1), (322, 4, 1, side),
            (323, 4, 1, side), (324, 4, count, offsets if count > 1 else first),
            (325, 4, count, counts if count > 1 else len(tile)),
        ]  # fmt: skip
        struct.pack_into("<L", data, pointer, len(data))
        data += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHLL", *tag) for tag in tags)
        pointer = len(data)
        data += bytes(4)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return pyramid(tmp_path_factory.mktemp("slide") / "a.tif", [(40_000, 30_000), (8_000, 6_000), (2_500, 1_875)])


def colour(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((image.width // 2, image.height // 2))


def test_a_suitable_level_is_shown_never_the_full_size(slide, monkeypatch):
    read = []
    whole = openslide.OpenSlide.read_region
    monkeypatch.setattr(
        openslide.OpenSlide, "read_region", lambda self, *words: read.append(words) or whole(self, *words)
    )
    image = open_image(slide)
    assert image.mode == "RGB" and image.size == (2048, 1536) and colour(image) == COLOURS[2]
    assert read == [((0, 0), 2, (2_500, 1_875))]
    assert colour(open_image(slide, frame=1)) == COLOURS[1] and read[1][1] == 1
    for level in (0, 3, -1):
        with pytest.raises(LlavaError, match=f"level {level} can't be shown; a level from 1 to 2 can"):
            open_image(slide, frame=level)
    assert all(level for _, level, _ in read)


def test_a_level_is_a_default_too(slide):
    """`--frame 1` of a command, for images that say nothing themselves."""
    (shown,) = with_default_options([slide], ImageOptions(frame=1, preset="lung"))
    assert shown.options == ImageOptions(frame=1) and colour(open_image(shown)) == COLOURS[1]


def test_small_slides_show_their_largest_smaller_level(tmp_path):
    small = pyramid(tmp_path / "small.tif", [(1_200, 900), (600, 450), (300, 225)])
    assert open_image(small).size == (600, 450) and colour(open_image(small)) == COLOURS[1]


def test_limits_hold_for_the_level(slide):
    with pytest.raises(ImageError, match="2500 × 1875 pixels is beyond"):
        open_image(slide, limits=Limits(max_pixels=1_000_000))


def test_what_is_said_of_a_slide(slide, capsys):
    facts = describe_image(slide)
    assert (facts.kind, facts.frames, facts.frame, facts.width) == ("slide", 3, 2, 2048)
    assert facts.shown[0] == "level 2 of 3 (2500 × 1875), the smallest of 2048 pixels, never the full size"
    assert info([str(slide)]) == 0
    said = capsys.readouterr()
    assert "generic-tiff, levels 40000 × 30000" in said.out and "Unmistakable" not in said.out + said.err


def test_an_ordinary_tiff_is_no_slide(tmp_path):
    one = pyramid(tmp_path / "one.tif", [(600, 400)])
    assert open_image(one).size == (600, 400) and describe_image(one).kind == "TIFF"
    pages = [Image.new("RGB", (60, 40), "red"), Image.new("RGB", (30, 20), "blue")]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert open_image(tmp_path / "pages.tif").size == (60, 40)
    pages[0].save(tmp_path / "plain.svs", "TIFF")  # no scanner's file, whatever its name says
    assert open_image(tmp_path / "plain.svs").size == (60, 40)


def test_a_damaged_slide_is_one_line(slide, tmp_path):
    content = bytearray(slide.read_bytes())
    content[100:] = content[100:].replace(struct.pack("<HHLL", 259, 3, 1, 1), struct.pack("<HHLL", 259, 3, 1, 7))
    (tmp_path / "broken.tif").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "broken.tif")
    assert "\n" not in str(caught.value)


def test_without_the_extra_one_line_names_it(slide, tmp_path):
    script = (
        "import sys; sys.modules['openslide'] = None; from llava.commandline import run; "
        "from llava.images.info import main; run(main)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(slide)], capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "llava-med[slides]"' in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("name", "index", "content"),
    [
        ("a.vms", "a.vms", "[Virtual Microscope Specimen]\nImageFile(1,0)=../b/secret.jpg\n"),
        ("a.vmu", "a.vmu", "[Uncompressed Virtual Microscope Specimen]\nmapfile = /etc/passwd\n"),
        ("a.mrxs", "a/Slidedat.ini", "[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = ..\\Data0000.dat\n"),
        ("a.vms", "a.vms", "\n" * (2 << 20)),
        ("a.vms", "a.vms", "ImageFile" + " " * 500_000 + "\nMapFile=/etc/passwd\n"),
    ],
    ids=["a folder beside", "an absolute path", "another system's path", "too long", "a line of blanks"],
)
@pytest.mark.timeout(60)
def test_an_index_names_files_beside_it_alone(name, index, content, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / name).write_bytes(b"\xff\xd8 a thumbnail" if name != index else b"")
    (tmp_path / index).write_text(content)
    with pytest.raises(ImageError, match="names files of other folders"):
        open_image(tmp_path / name)


def test_an_index_of_files_beside_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "a.vms").write_text("[Virtual Microscope Specimen]\nImageFile=b.jpg\nObjective=C:/x\n")
    with pytest.raises(LlavaError, match="openslide"):
        open_image(tmp_path / "a.vms")
