"""Small files that would cost gigabytes or minutes: `open_image` stays within its promise, a plain reader doesn't; and
sound ones as large as they may be."""

import json
import subprocess
import sys

import pytest

from llava.images import open_image
from tests.security.hidden_bombs import COUNTED, HIDDEN, SORTED
from tests.security.image_bombs import AT_CAP, BOMBS, encoded, open_plainly
from tests.security.slide_bombs import DEFLATE, JPEG_2000, SLIDES, sound

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

SOUND = {"rle_in_dicom", "jpeg_fill_bytes", "jpeg_exif", "png_text", "gif_comments", "nifti_extensions", "nifti_zeros"}
"""An image is in them, and is shown: only what stands around it is too much."""
SOUND |= {"tiff_exif", "tiff_gps", "big_tiff_exif"}
QUICK = ("jpeg_in_dicom", "j2k_in_dicom", "tiff_tags", "png_text", "tiff_exif", "palette_repeats", "tiff_second_image")


def measure(how: str, *names: str) -> tuple[dict[str, dict], int]:
    """(what each came to, exit status)"""
    command = [sys.executable, "-m", "tests.security.measured", how, *names]
    done = subprocess.run(command, capture_output=True, text=True)
    return {entry["name"]: entry for entry in map(json.loads, done.stdout.splitlines())}, done.returncode


def test_every_bomb_is_an_image_error_or_the_image_within_time_and_memory():
    results, status = measure("ours", *BOMBS, *HIDDEN)
    assert status == 0 and set(results) == {*BOMBS, *HIDDEN}, "a limit ended it"
    for name, result in results.items():
        assert result["outcome"] == ("opened" if name in SOUND else "ImageError"), result
        assert "needs more memory" not in result["text"] and "\n" not in result["text"], result


def test_what_is_said_of_a_file_costs_no_more():
    results, status = measure("described", *BOMBS, *HIDDEN, *COUNTED)
    assert status == 0 and set(results) == {*BOMBS, *HIDDEN, *COUNTED}, "a limit ended it"
    for name, result in results.items():
        assert result["outcome"] == ("opened" if name in {*SOUND, *COUNTED} else "ImageError"), result


def test_nor_does_its_place_in_a_series():
    results, status = measure("placed", *SORTED)
    assert status == 0 and {name: result["outcome"] for name, result in results.items()} == dict.fromkeys(
        SORTED, "ImageError"
    ), results


@pytest.mark.parametrize("name", SLIDES)
def test_a_slide_as_well(name):
    pytest.importorskip("openslide", reason="openslide isn't installed (extra slides)")
    results, status = measure("slides", name)
    assert status == 0 and results[name]["outcome"] == "ImageError", results
    assert "needs more memory" not in results[name]["text"], results


@pytest.mark.parametrize("compression", [DEFLATE, JPEG_2000])
def test_a_sound_slide_of_that_kind_is_shown(compression, tmp_path):
    pytest.importorskip("openslide", reason="openslide isn't installed (extra slides)")
    (tmp_path / "a.svs").write_bytes(sound(compression))
    assert open_image(tmp_path / "a.svs").size == (2048, 1024)


@pytest.mark.long
@pytest.mark.parametrize("name", AT_CAP)
def test_the_largest_sound_images_are_opened_within_time_and_memory(name):
    results, status = measure("ours", name)
    assert status == 0 and results[name]["outcome"] == "opened", results


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in {**BOMBS, **HIDDEN, **COUNTED}],
)
def test_each_bites_a_reader_that_trusts_it(name):
    """Killed by the processor's limit, out of memory, or a sound image refused."""
    results, status = measure("plainly", name)
    assert status != 0 or results[name]["outcome"] != "opened"


def test_the_plain_reader_reads_what_is_harmless():
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        open_plainly(encoded(kind))
