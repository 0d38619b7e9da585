"""How scans are shown: each option's value, what excludes what, which files take it, flags, and defaults."""

import logging

import numpy as np
import pytest
from PIL import Image

from llava.commandline import ArgumentParser
from llava.errors import LlavaError
from llava.image_options import CT_WINDOWS, ImageOptions, add_image_flags, image_options_from_args, read_image_entry
from llava.images import ImageWithOptions, describe_image, open_image, with_default_options
from tests.images.test_medical import HOUNSFIELD, dicom

nibabel = pytest.importorskip("nibabel")


@pytest.fixture
def files(tmp_path):
    """A CT slice, four frames, a volume and a photograph."""
    frames = np.stack([np.full((4, 4), level, np.uint8) for level in (10, 60, 120, 240)])
    (tmp_path / "ct.dcm").write_bytes(dicom(HOUNSFIELD, WindowCenter=0, WindowWidth=100))
    (tmp_path / "frames.dcm").write_bytes(dicom(frames, WindowCenter=128, WindowWidth=256))
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "volume.nii.gz")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photo.png")
    return tmp_path


def pixels(source, **options):
    return np.asarray(open_image(source, **options))


def test_options_are_the_arguments_of_open_image(files):
    for name, given, plain in (
        ("ct.dcm", {"preset": "lung"}, {"window": "lung"}),
        ("ct.dcm", {"window": [-600, 1500]}, {"window": CT_WINDOWS["lung"]}),
        ("ct.dcm", {"preset": "Soft Tissue"}, {"window": (40, 400)}),
        ("frames.dcm", {"frame": 3}, {"frame": 3}),
        ("volume.nii.gz", {"axis": 0, "slice": 1, "window": [60, 100]}, {"axis": 0, "frame": 1, "window": (60, 100)}),
    ):
        path = files / name
        for source in (path, path.read_bytes()):
            image = ImageWithOptions(source, ImageOptions.parse(given))
            np.testing.assert_array_equal(pixels(image), pixels(source, **plain))
            assert describe_image(image) == describe_image(source, **plain)
        assert not np.array_equal(pixels(path, **plain), pixels(path))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"widow": [1, 2]}, "'widow' is no option of an image; known: window, preset, frame, axis, slice"),
        ({"window": [40]}, "window: .40. is no centre and width"),
        ({"window": "40,80"}, "window: '40,80' is no centre and width"),
        ({"window": [40, True]}, "window: .* is no centre and width"),
        ({"window": [40, float("nan")]}, "window: .* is no centre and width"),
        ({"window": [40, 0]}, "window: the width has to be above 0"),
        ({"preset": "lungs"}, "preset: 'lungs' is unknown; give one of brain"),
        ({"preset": ["lung"]}, "preset: .* is unknown"),
        ({"frame": -1}, "frame: -1 is no whole number from 0"),
        ({"slice": 1.5}, "slice: 1.5 is no whole number"),
        ({"slice": True}, "slice: True is no whole number"),
        ({"axis": 3}, "axis: 3 is none of 0"),
        ({"window": [40, 80], "preset": "lung"}, "window and preset exclude each other"),
        ({"frame": 1, "slice": 1}, "frame and slice exclude each other"),
        ({"frame": 1, "axis": 1}, "frame and axis exclude each other"),
        ([1], "image options are an object"),
    ],
)
def test_what_is_wrong_is_named(given, words):
    with pytest.raises(LlavaError, match=words):
        ImageOptions.parse(given)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("photo.png", {"preset": "lung"}, "photo.png: preset is given, but the file is neither DICOM nor NIfTI"),
        ("ct.dcm", {"slice": 1}, "ct.dcm: slice is given, but the file is a DICOM file, which takes window, preset"),
        ("volume.nii.gz", {"frame": 1}, "volume.nii.gz: frame is given, but the file is a NIfTI volume"),
        ("frames.dcm", {"frame": 4}, "frame 4 doesn't exist; the file has 4"),
        ("volume.nii.gz", {"slice": 6}, "axial slice 6 doesn't exist"),
    ],
)
def test_a_file_that_does_not_take_an_option_says_so(files, name, given, words):
    with pytest.raises(LlavaError, match=words):
        open_image(ImageWithOptions(files / name, ImageOptions.parse(given)))


def test_options_are_given_once(files):
    with pytest.raises(LlavaError, match="takes no frame, window or axis beside them"):
        open_image(ImageWithOptions(files / "ct.dcm", ImageOptions(preset="lung")), window="bone")


def test_entries():
    assert read_image_entry({"path": "a.png", "bytes": None, "preset": None}) == "a.png"
    assert read_image_entry({"bytes": b"x", "path": None}) == {"bytes": b"x", "path": None}
    found = read_image_entry({"path": "a.dcm", "preset": "lung"})
    assert found == ImageWithOptions("a.dcm", ImageOptions(preset="lung"))
    assert read_image_entry({"path": "a.dcm", "bytes": b"x", "frame": 2}) == ImageWithOptions(
        b"x", ImageOptions(frame=2)
    )
    assert ImageOptions.parse(found.options.as_dict()) == found.options


def flags(*words):
    parser = ArgumentParser()
    add_image_flags(parser)
    return image_options_from_args(parser.parse_args(words))


def test_flags():
    assert not flags()
    assert flags("--window", "-600,1500") == ImageOptions(window=(-600, 1500))
    assert flags("--window", "lung") == flags("--preset", "Lung") == ImageOptions(preset="lung")
    assert flags("--axis", "0", "--slice", "3") == ImageOptions(axis=0, slice=3)
    assert flags("--frame", "3") == ImageOptions(frame=3)
    for words in (["--window", "x"], ["--window", "40,80", "--preset", "lung"], ["--frame", "-2"]):
        with pytest.raises(LlavaError, match=words[0]):
            flags(*words)


def test_defaults_fill_what_an_image_does_not_say(files, caplog):
    own = ImageWithOptions(files / "volume.nii.gz", ImageOptions(slice=2))
    images = [files / "ct.dcm", files / "photo.png", own, files / "volume.nii.gz"]
    with caplog.at_level(logging.WARNING):
        ct, photo, chosen, volume = with_default_options(images, ImageOptions(preset="bone", axis=0, slice=1))
    assert ct.options == ImageOptions(preset="bone") and photo == files / "photo.png"
    # What is said of the place is one thing: slice 2 is one of axis 2.
    assert chosen.options == ImageOptions(preset="bone", slice=2)
    assert volume.options == ImageOptions(preset="bone", axis=0, slice=1)
    assert "1 of 4 images take nothing of preset bone, axis 0, slice 1" in caplog.text
    for image in (ct, photo, chosen, volume):
        open_image(image)
    assert with_default_options(images, ImageOptions()) == images
    own_window = ImageWithOptions(files / "ct.dcm", ImageOptions(window=(0, 9)))
    assert with_default_options([own_window], ImageOptions(preset="bone")) == [own_window]


def test_a_tilde_is_the_home_folder_or_part_of_a_name(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    (shown,) = with_default_options(["~/ct.dcm"], ImageOptions(preset="bone"))
    np.testing.assert_array_equal(pixels(shown), pixels(files / "ct.dcm", window="bone"))
    monkeypatch.chdir(files)
    (files / "~no-user.png").write_bytes((files / "photo.png").read_bytes())
    assert open_image("~no-user.png").size == (8, 8)
    with pytest.raises(LlavaError, match="image not found: ~no-user/a"):
        open_image("~no-user/a.png")
