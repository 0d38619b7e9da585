"""`python -m llava.images.info`: what is in a file and what is shown of it, and nothing of whom it is of."""

import base64
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.image_options import parse_window
from llava.images import describe_image, open_image
from llava.images.convert import build_parser as convert_parser
from llava.images.facts import plane_of
from llava.images.info import build_parser as info_parser
from llava.images.info import main
from llava.images.opening import open_and_describe
from tests.tiny import make_llava

pydicom = pytest.importorskip("pydicom", reason="pydicom isn't installed (extra medical)")
nibabel = pytest.importorskip("nibabel", reason="nibabel isn't installed (extra medical)")


FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def ct() -> str:
    return str(FILES / "CT_small.dcm")


@pytest.fixture
def volume(tmp_path):
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    path = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-1.0, 2.0, 3.0, 1.0])), path)
    return path


def test_a_volume_is_described_where_it_lies(tmp_path):
    path = tmp_path / "large.nii"
    empty = nibabel.Nifti1Image(np.zeros((256, 256, 1), np.uint8), np.eye(4))
    empty.header.set_data_shape((256, 256, 2048))
    with path.open("wb") as file:
        file.write(empty.header.binaryblock + bytes(4))
        file.truncate(352 + 256 * 256 * 2048)
    tracemalloc.start()
    try:
        assert describe_image(path).frames == 2048
        assert tracemalloc.get_traced_memory()[1] < 32 << 20, "it has 128 MiB"
    finally:
        tracemalloc.stop()


def test_a_ct_slice():
    facts = describe_image(ct())
    assert (facts.kind, facts.width, facts.height, facts.modality) == ("DICOM", 128, 128, "CT")
    assert facts.orientation == "axial" and facts.spacing_mm == pytest.approx((0.661468, 0.661468, 5.0))
    assert "Explicit VR Little Endian" in facts.stored and "16 bits" in facts.stored
    assert facts.window is None and "percentile" in facts.shown[0]
    lung = describe_image(ct(), window="lung")
    assert lung.window == (-600, 1500) and lung.shown[0] == "window -600/1500 (centre/width), as asked"


def test_frames_windows_and_inversion(tmp_path):
    colour = describe_image(FILES / "SC_rgb_rle_2frame.dcm")
    assert (colour.frames, colour.frame) == (2, 1)
    assert colour.shown == ["frame 1 of 2, the middle one", "its colours"]
    assert describe_image(FILES / "SC_rgb_rle_2frame.dcm", frame=0).shown[0] == "frame 0 of 2, as asked"
    header = pydicom.dcmread(ct())
    header.PhotometricInterpretation, header.WindowCenter, header.WindowWidth = "MONOCHROME1", 50, 350
    header.BurnedInAnnotation, header.PixelPaddingValue = "YES", -2000
    header.save_as(tmp_path / "inverse.dcm")
    shown = describe_image(tmp_path / "inverse.dcm").shown
    assert shown[0] == "window 50/350 (centre/width), the file's own" and "MONOCHROME1" in shown[1]
    assert shown[2] == "padding is black" and "burnt into its pixels" in shown[3]


@pytest.mark.parametrize("name", ["SC_rgb_rle_2frame.dcm", "examples_palette.dcm"])
def test_text_burnt_into_a_colour_image_is_told_too(tmp_path, name):
    """As in ultrasound and screenshots, where it is most common."""
    header = pydicom.dcmread(FILES / name)
    header.BurnedInAnnotation = "YES"
    header.save_as(tmp_path / name)
    *_, colours, burnt = describe_image(tmp_path / name).shown
    assert colours == "its colours" and "burnt into its pixels" in burnt


@pytest.mark.parametrize(
    ("axis", "plane", "slices", "size", "spacing"),
    [
        (0, "sagittal", 4, (5, 6), (3, 2, 1)),
        (1, "coronal", 5, (4, 6), (3, 1, 2)),
        (2, "axial", 6, (4, 5), (2, 1, 3)),
    ],
)
def test_a_volume(volume, axis, plane, slices, size, spacing):
    """`spacing`: between rows, columns and slices, of voxels of 1 x 2 x 3 mm."""
    facts = describe_image(volume, axis=axis)
    assert (facts.kind, facts.orientation, facts.frames, facts.frame) == ("NIfTI", plane, slices, slices // 2)
    assert (facts.width, facts.height) == size == open_image(volume, axis=axis).size
    assert facts.spacing_mm == spacing and "axes LAS" in facts.stored and "int16" in facts.stored
    assert any("percentile" in line for line in facts.shown)
    high, wide, _ = spacing
    assert facts.shown[-1] == f"not stretched: in the patient it is {high / wide:.3g} times as high as here"


def test_proportions_that_are_right_are_not_told(tmp_path):
    header = pydicom.dcmread(ct())
    assert not any("stretched" in line for line in describe_image(ct()).shown)
    header.PixelSpacing = [0.5, 1]
    header.save_as(tmp_path / "flat.dcm")
    assert (
        describe_image(tmp_path / "flat.dcm").shown[-1] == "not stretched: in the patient it is 2 times as wide as here"
    )


def test_the_spacing_of_a_volume_is_in_millimetres_whatever_its_axes_and_unit():
    values = np.zeros((4, 5, 6), np.int16)
    turned = nibabel.Nifti1Image(values, np.array([[0, 0, 1, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1.0]]))
    for unit, factor in (("mm", 1), ("unknown", 1), ("micron", 0.001), ("meter", 1000)):
        turned.header.set_xyzt_units(unit)
        assert describe_image(turned.to_bytes()).spacing_mm == pytest.approx((2 * factor, factor, 3 * factor))
    flat = nibabel.Nifti1Image(values[..., 0], np.diag([1.0, 2.0, 3.0, 1.0])).to_bytes()
    assert describe_image(flat).spacing_mm == (2, 1)


def test_what_is_described_is_decoded_once(monkeypatch):
    """As the web page asks for each slice: its pixels, and why they look so."""
    decoder, decoded = pydicom.pixels.decoders.base.Decoder, []
    whole = decoder.as_array
    monkeypatch.setattr(decoder, "as_array", lambda self, *a, **b: decoded.append(1) or whole(self, *a, **b))
    for name in ("CT_small.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_rle_2frame.dcm"):
        decoded.clear()
        image, facts = open_and_describe(FILES / name)
        assert len(decoded) == 1 and facts == describe_image(FILES / name)
        assert image.size == (facts.width, facts.height) and image == open_image(FILES / name)


def test_a_data_url_is_described(volume):
    for path in (Path(ct()), volume):
        content = path.read_bytes()
        url = "data:application/octet-stream;base64," + base64.b64encode(content).decode()
        assert describe_image(url) == describe_image(content) == describe_image(path)


def test_photographs(tmp_path):
    pixels = Image.fromarray(np.zeros((6, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(tmp_path / "turned.jpg", exif=exif)
    facts = describe_image(tmp_path / "turned.jpg")
    assert (facts.kind, facts.width, facts.height, facts.orientation) == ("JPEG", 6, 9, "EXIF 6")
    Image.fromarray(np.zeros((6, 9), np.uint16)).save(tmp_path / "deep.png")
    assert "more than 8 bits" in describe_image(tmp_path / "deep.png").shown[0]
    pixels.convert("RGBA").save(tmp_path / "clear.png")
    assert "transparency over white" in describe_image(tmp_path / "clear.png").shown
    pixels.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (9, 6), "white")])
    assert describe_image(tmp_path / "moving.gif").frames == 2
    # What was asked for in vain isn't passed over.
    for asked, words in (
        ({"window": "lung"}, "window"),
        ({"frame": 1}, "frame"),
        ({"window": (1, 2), "frame": 0}, "window or frame"),
    ):
        assert describe_image(tmp_path / "moving.gif", **asked).shown[-1] == f"no {words} can be chosen of it"


def test_planes():
    axes = np.eye(3)
    assert [plane_of(axes[1], axes[2]), plane_of(axes[0], axes[2]), plane_of(axes[0], axes[1])] == [
        "sagittal",
        "coronal",
        "axial",
    ]
    assert plane_of(np.array([1, 1, 0.0]), axes[2]) == "oblique" and plane_of(axes[0], axes[0]) == "unknown"


def test_windows_as_text():
    assert parse_window("40,80") == parse_window("40/80") == (40, 80) and parse_window("Lung") == "lung"
    with pytest.raises(LlavaError, match="--window x: give centre and width"):
        parse_window("x")


def test_a_window_below_zero_needs_no_equals_sign():
    for parser, words in ((info_parser(), ["ct.dcm"]), (convert_parser(), ["in", "--output-dir", "out"])):
        assert parser.parse_args([*words, "--window", "-600,1500"]).window == (-600, 1500)


@pytest.mark.parametrize("flag", ["--window", "--preset"])
def test_what_is_wrong_with_a_window_is_said_of_the_flag_that_was_typed(flag):
    for parser, words in ((info_parser(), ["ct.dcm"]), (convert_parser(), ["in", "--output-dir", "out"])):
        with pytest.raises(LlavaError, match=f"^{flag} lungs: give centre and width, such as 40,80, or one of brain"):
            parser.parse_args([*words, flag, "lungs"])
    assert convert_parser().parse_args(["in", "--output-dir", "out", flag, "auto"]).window == "auto"


def test_the_command(tmp_path, volume, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    words = [ct(), str(volume), str(tmp_path / "broken.png"), "--save", str(tmp_path / "seen")]
    assert (
        main([*words, "--json", str(tmp_path / "found.json"), "--frame", "0", "--axis", "2", "--window", "lung"]) == 2
    )
    said = capsys.readouterr()
    assert "DICOM, 128 × 128" in said.out and "axial slice 0 of 6, as asked" in said.out
    assert said.err.count("\n") == 1 and "broken.png" in said.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert [entry.get("kind") for entry in found] == ["DICOM", "NIfTI", None] and "error" in found[2]
    seen = Image.open(tmp_path / "seen" / "CT_small.dcm.png")
    assert np.array_equal(np.asarray(seen), np.asarray(open_image(ct(), window="lung")))
    assert main([ct(), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["modality"] == "CT"
    with pytest.raises(LlavaError, match="several files need a folder"):
        main([ct(), str(volume), "--save", str(tmp_path / "one.png")])


def test_files_of_one_name_lose_nothing(tmp_path):
    """As in a hospital's folders, where each series has its 0001.dcm."""
    files = [tmp_path / series / "0001.png" for series in "abc"]
    for grey, file in enumerate(files):
        file.parent.mkdir()
        Image.new("L", (4, 4), grey).save(file)
    names = [*map(str, files), str(files[0])]
    for _ in range(2):  # the same again is fine
        assert main([*names, "--save", str(tmp_path / "seen")]) == 0
    seen = {file.name: Image.open(file).getpixel((0, 0))[0] for file in (tmp_path / "seen").iterdir()}
    assert seen == {"0001.png.png": 0, "0001.png-2.png": 1, "0001.png-3.png": 2, "0001.png-4.png": 0}


def test_presets_and_slices_have_the_names_of_the_other_commands(volume, capsys):
    assert main([ct(), "--preset", "bone"]) == 0 and main([str(volume), "--slice", "1"]) == 0
    said = capsys.readouterr().out
    assert "window 400/1800" in said and "axial slice 1 of 6, as asked" in said


def test_a_folder(tmp_path, capsys):
    (tmp_path / "scans").mkdir()
    assert main([str(tmp_path / "scans"), ct()]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "CT_small.dcm: DICOM" in said.out
    assert f"name files in it ({tmp_path}/scans/*), or make a training set" in said.err
    assert f"llava-med image-convert {tmp_path}/scans --output-dir" in said.err


def test_what_the_tower_gets(tmp_path):
    folder = make_llava(tmp_path / "model")
    assert main([ct(), "--save", str(tmp_path / "seen.png"), "--model-path", str(folder)]) == 0
    assert Image.open(tmp_path / "seen.png").size == (28, 28)
    # In transformers' layout the image processor's file says that images are padded, and may be part of another.
    wide = tmp_path / "wide.png"
    Image.new("RGB", (80, 20), "white").save(wide)
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"do_pad": True}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert main([str(wide), "--save", str(tmp_path / "wide"), "--model-path", str(folder)]) == 0
    seen = np.asarray(Image.open(tmp_path / "wide" / "wide.png.png"))
    assert (seen[14] > 250).all() and (seen[:9] < 150).all() and (seen[-9:] < 150).all(), "the whole image, padded"


def test_a_model_path_alone_says_nothing(tmp_path):
    for words, match in (([], "it says what --save writes"), (["--save", "x.png"], "--model-path is not a folder")):
        with pytest.raises(LlavaError, match=match):
            main([ct(), "--model-path", str(tmp_path / "none"), *words])
    with pytest.raises(LlavaError, match=r"has no preprocessor_config\.json"):
        main([ct(), "--model-path", str(tmp_path), "--save", "x.png"])
