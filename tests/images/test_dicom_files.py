"""All test files of pydicom against its own pipeline; enhanced files; decoders that aren't there."""

import io
import json
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.errors import ImageError
from llava.images import describe_image, open_image
from llava.images.series import series_place, survey
from tests.images.test_medical import dicom, grey

pydicom = pytest.importorskip("pydicom", reason="pydicom isn't installed (extra medical)")

from pydicom.data import get_testdata_files  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402

FILES = sorted(Path(name) for name in get_testdata_files() if Path(name).is_file())
STACK = np.random.default_rng(2).integers(0, 1000, (5, 6, 8)).astype(np.int16)


def pipeline(dataset, window=None) -> np.ndarray | None:
    """uint8 `[rows, columns]` or `[rows, columns, 3]` by pydicom's functions; None where there is no window."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    values = dataset.pixel_array
    values = values[frames // 2] if frames > 1 else values
    if dataset.SamplesPerPixel == 3:
        return values / ((1 << dataset.BitsStored) - 1) * 255
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colours = pydicom.pixels.apply_color_lut(values, dataset)
        top = np.iinfo(colours.dtype).max
        return np.round(colours[..., :3] / top * 255)
    real = pydicom.pixels.apply_modality_lut(values, dataset)
    if window:
        dataset.WindowCenter, dataset.WindowWidth = window
        if "VOILUTFunction" in dataset:
            del dataset.VOILUTFunction
    elif "WindowWidth" not in dataset or "VOILUTSequence" in dataset:
        return None
    shown = pydicom.pixels.apply_windowing(real, dataset)
    # It spreads the window over the values that the pixels could have, after rescaling.
    bits, is_signed = dataset.BitsStored, dataset.PixelRepresentation
    ends = np.array([-(1 << bits - 1), (1 << bits - 1) - 1] if is_signed else [0, (1 << bits) - 1], float)
    if "RescaleSlope" in dataset and "ModalityLUTSequence" not in dataset:
        ends = ends * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    shown = (shown - ends[0]) / (ends[1] - ends[0]) * 255
    return 255 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_of_pydicoms(path):
    """Equal to pydicom's own pipeline where it has pixels that pydicom reads, and a plain line where not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(path)
            real = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
        except Exception:  # noqa: BLE001 - no DICOM, no pixels, damaged, no decoder
            dataset = None
        if dataset is None:
            try:
                assert open_image(path).mode == "RGB"  # a JPEG that pydicom can't decode
            except ImageError as error:
                assert "\n" not in str(error) and str(error).startswith(str(path))
            return
        window = (float(np.mean(real)), max(float(np.std(real)) * 3, 2.0))
        for option in (window, None):
            expected = pipeline(pydicom.dcmread(path), option)
            if expected is None:
                continue
            shown = np.asarray(open_image(path, window=option)).astype(float)
            shown = shown[..., 0] if expected.ndim == 2 else shown
            assert np.abs(shown - expected).max() <= 1, option


def test_the_files_are_enough():
    syntaxes = set()
    for path in FILES:
        if path.suffix == ".dcm":
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            syntaxes.add(header.file_meta.get("TransferSyntaxUID"))
    assert len(FILES) > 100 and len(syntaxes) >= 11, syntaxes


def test_12_bit_jpeg():
    """A sequential JPEG whose scan says that it holds the first coefficient alone, as some writers leave it."""
    path = next(path for path in FILES if path.name == "JPEG-lossy.dcm")
    values = np.asarray(open_image(path))
    assert values.shape == (1024, 256, 3) and values.std() > 20


HIDDEN = """
import sys
for name in ("pylibjpeg", "libjpeg", "openjpeg", "gdcm", "jpeg_ls", "pyjpegls"):
    sys.modules[name] = None
import json
from llava.errors import ImageError
from llava.images import open_image
found = {}
for path in sys.argv[1:]:
    try:
        open_image(path)
        found[path] = None
    except ImageError as error:
        found[path] = str(error)
print(json.dumps(found))
"""


def test_each_syntax_and_package_is_named_where_a_decoder_is_missing(tmp_path):
    """In a process that has pydicom and Pillow alone."""
    compressed = {}
    for path in FILES:
        if path.suffix == ".dcm":
            syntax = pydicom.dcmread(path, stop_before_pixels=True, force=True).file_meta.get("TransferSyntaxUID")
            if syntax and syntax.is_compressed and "Deflated" not in syntax.name and grey_opens(path):
                compressed[path] = syntax
    for syntax in pydicom.uid.JPEGTransferSyntaxes + pydicom.uid.JPEGLSTransferSyntaxes:
        path = tmp_path / f"{syntax}.dcm"
        path.write_bytes(encapsulated(syntax))
        compressed[path] = syntax
    words = [sys.executable, "-c", HIDDEN, *map(str, compressed)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named = set()
    for path, text in json.loads(done.stdout).items():
        if text is not None:
            syntax = compressed[Path(path)]
            assert f"compressed as {syntax.name}; to read it, pip install pylibjpeg pylibjpeg-" in text, text
            named.add(syntax)
    assert named >= {*pydicom.uid.JPEGLSTransferSyntaxes, *pydicom.uid.JPEGTransferSyntaxes[1:]}


def grey_opens(path) -> bool:
    try:
        return bool(open_image(path))
    except ImageError:
        return False


def encapsulated(syntax) -> bytes:
    """A DICOM file of this syntax around a JPEG of 12 bits that Pillow doesn't read."""
    source = next(path for path in FILES if path.name == "JPEG-lossy.dcm")
    dataset = pydicom.dcmread(source)
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def test_video_is_named():
    dataset = pydicom.dcmread(next(path for path in FILES if path.name == "JPEG-lossy.dcm"))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    with pytest.raises(ImageError, match=r"no decoder for the DICOM transfer syntax MPEG-4 .*; convert the file"):
        open_image(buffer.getvalue())


def items(**sequences) -> Dataset:
    """A group whose sequences have one item each."""
    group = Dataset()
    for name, tags in sequences.items():
        item = Dataset()
        for tag, value in tags.items():
            setattr(item, tag, value)
        setattr(group, name, [item])
    return group


def enhanced(places=(8.0, 2.0, 4.0, 6.0, 0.0)) -> bytes:
    """Five frames out of order, each with a window and a rescale of its own; the orientation is one for all."""
    shared = items(
        PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        PixelMeasuresSequence={"PixelSpacing": [0.5, 0.25], "SliceThickness": 3},
    )
    frames = [
        items(
            PlanePositionSequence={"ImagePositionPatient": [1, 2, place]},
            PixelValueTransformationSequence={"RescaleSlope": 1 + number, "RescaleIntercept": -100 * number},
            FrameVOILUTSequence={"WindowCenter": 500 + 10 * number, "WindowWidth": 400 + number},
        )
        for number, place in enumerate(places)
    ]
    return dicom(
        STACK,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
        SeriesInstanceUID="1.2.3.4",
        Modality="CT",
    )


def test_each_frame_of_an_enhanced_file_has_its_own_groups(tmp_path):
    content = enhanced()
    (tmp_path / "x.dcm").write_bytes(content)
    for number, place in enumerate((8.0, 2.0, 4.0, 6.0, 0.0)):
        single = dicom(
            STACK[number],
            RescaleSlope=1 + number, RescaleIntercept=-100 * number,
            WindowCenter=500 + 10 * number, WindowWidth=400 + number,
        )  # fmt: skip
        np.testing.assert_array_equal(grey(content, frame=number), grey(single))
        np.testing.assert_array_equal(grey(content, frame=number, window="bone"), grey(single, window="bone"))
        facts = describe_image(tmp_path / "x.dcm", frame=number)
        assert (
            facts.position_mm == (1, 2, place) and facts.spacing_mm == (0.5, 0.25, 3) and facts.orientation == "axial"
        )
        assert facts.window == (500 + 10 * number, 400 + number)


def test_frames_are_sorted_by_place(tmp_path):
    (tmp_path / "x.dcm").write_bytes(enhanced())
    (series,) = survey(tmp_path).series
    assert [one.frame for one in series.slices] == [4, 1, 2, 3, 0]
    (tmp_path / "x.dcm").write_bytes(dicom(STACK))
    assert [one.frame for one in survey(tmp_path).series[0].slices] == [0, 1, 2, 3, 4]
    (tmp_path / "x.dcm").write_bytes(dicom(STACK, NumberOfFrames=2_000_000_000))
    assert survey(tmp_path).left_out and not survey(tmp_path).series


def test_frames_of_two_directions_are_two_series(tmp_path):
    dataset = pydicom.dcmread(io.BytesIO(enhanced()))
    del dataset.SharedFunctionalGroupsSequence
    for number, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        across = [1, 0, 0, 0, 0, -1] if number < 2 else [1, 0, 0, 0, 1, 0]
        group.update(items(PlaneOrientationSequence={"ImageOrientationPatient": across}))
    dataset.save_as(tmp_path / "x.dcm")
    assert sorted([one.frame for one in series.slices] for series in survey(tmp_path).series) == [[0, 1], [4, 2, 3]]


def test_a_series_is_one_however_the_zeros_of_its_directions_are_signed(tmp_path):
    """As scanners write them, for the page, which sees one file at a time, and in a folder."""
    for place, small in enumerate((-1e-4, 0.0, 1e-4)):
        tags = {"ImageOrientationPatient": [1, small, 0, 0, 1, -small], "ImagePositionPatient": [0, 0, place]}
        content = dicom(STACK[0], SeriesInstanceUID="1.2.3.4", InstanceNumber=place, **tags)
        (tmp_path / f"{place}.dcm").write_bytes(content)
    (series,) = survey(tmp_path).series
    assert len(series.slices) == 3
    assert len({series_place(path.read_bytes()).series for path in tmp_path.iterdir()}) == 1


def test_a_jpeg_inside_and_outside_dicom_is_the_same():
    """Baseline JPEG's scan parameters are set before it is decoded; that changes nothing of a sound one."""
    buffer = io.BytesIO()
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))).save(buffer, "JPEG", quality=95)
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.zeros((48, 64), np.uint8), WindowCenter=128, WindowWidth=256)))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    inside = io.BytesIO()
    dataset.save_as(inside)
    np.testing.assert_array_equal(grey(inside.getvalue()), grey(buffer.getvalue()))


CELLS = np.random.default_rng(3).integers(-2048, 2048, (48, 64)).astype(np.int16)


@pytest.mark.parametrize("kind", ["plain", "RLE", "JPEG 2000"])
@pytest.mark.parametrize("signed", [False, True])
def test_the_high_bit_says_where_a_sample_ends(kind, signed):
    """As older files have it: 12 bits at the top of 16, with anything below."""
    stored = CELLS if signed else (CELLS + 2048).astype(np.uint16)
    window = {"WindowCenter": 0 if signed else 2048, "WindowWidth": 3000}
    expected = grey(dicom(stored, **window))
    below = np.arange(CELLS.size).reshape(CELLS.shape) % 16
    cells = ((stored.astype(np.int32) << 4) | below).astype(stored.dtype)
    np.testing.assert_array_equal(grey(with_bits(dicom(cells, **window), kind, stored=12, high=15)), expected)
    # A high bit that can't be isn't followed.
    np.testing.assert_array_equal(grey(with_bits(dicom(stored, **window), kind, stored=12, high=40)), expected)


def test_a_codec_of_fewer_bits_has_none_below():
    stored = (CELLS + 2048).astype(np.uint16)
    content = dicom(stored, BitsStored=12, HighBit=11, WindowCenter=2048, WindowWidth=3000)
    np.testing.assert_array_equal(grey(with_bits(content, "JPEG 2000", stored=12, high=15)), grey(content))


def with_bits(content: bytes, kind: str, stored: int, high: int) -> bytes:
    """Compressed as `kind`, and with another BitsStored and HighBit in the header."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    if kind != "plain":
        syntax = pydicom.uid.RLELossless if kind == "RLE" else pydicom.uid.JPEG2000Lossless
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.BitsStored, dataset.HighBit = stored, high
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def test_colours_of_fewer_bits_than_a_byte_are_as_bright():
    colours = np.random.default_rng(4).integers(0, 64, (6, 8, 3)).astype(np.uint8)
    expected = np.round(colours / 63 * 255)
    for stored, high in ((colours, 5), (colours << 2, 7)):
        shown = np.asarray(open_image(dicom(stored, BitsStored=6, HighBit=high)))
        assert np.abs(shown - expected).max() <= 1


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        *(
            (keyword, (b"", b"\x08", b"\x08\0\0", b"\x08\0\x08\0"))
            for keyword in ("Rows", "BitsAllocated", "BitsStored")
        ),
        ("PixelRepresentation", (b"", b"\x01\0\0")),
        ("SamplesPerPixel", (b"", b"\x01\0\0")),
        ("HighBit", (b"\x0f",)),
        ("PixelPaddingValue", (b"\x0f\0\0",)),
        ("PhotometricInterpretation", (b"", b"MONOCHROM")),
        ("NumberOfFrames", (b"one ", b"1\\1 ")),
        ("WindowCenter", (b"middle", bytes(300_000))),
        ("RescaleSlope", (b"steep ",)),
    ],
)
@pytest.mark.parametrize("is_implicit", [False, True])
def test_a_damaged_element_is_named(keyword, values, is_implicit, tmp_path):
    tags = {"WindowCenter": 500, "WindowWidth": 900, "RescaleSlope": 1, "PixelPaddingValue": 0, "NumberOfFrames": 1}
    for value in values:
        if len(value) < 65_536 or is_implicit:
            (tmp_path / "x.dcm").write_bytes(with_value(dicom(STACK[0], **tags), keyword, value, is_implicit))
            with pytest.raises(
                ImageError, match=rf"the DICOM header is damaged \({keyword} has .*; correct this element"
            ):
                open_image(tmp_path / "x.dcm")
            if keyword in ("Rows", "NumberOfFrames"):
                ((_, why),) = survey(tmp_path).left_out
                assert f"({keyword} has " in why


def test_a_damaged_spacing_is_named_where_it_is_told():
    content = with_value(dicom(STACK[0], PixelSpacing=[1, 1]), "PixelSpacing", b"1\\wide", False)
    assert open_image(content)
    with pytest.raises(ImageError, match=r"\(PixelSpacing has no usable value\)"):
        describe_image(content)


def with_value(content: bytes, keyword: str, value: bytes, is_implicit: bool) -> bytes:
    """The file with other bytes for the value of an element of a short type."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    if is_implicit:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer, implicit_vr=is_implicit, little_endian=True)
    tag = pydicom.datadict.tag_for_keyword(keyword)
    start = buffer.getvalue().index(struct.pack("<HH", tag >> 16, tag & 0xFFFF), 132) + (4 if is_implicit else 6)
    form, content = "<L" if is_implicit else "<H", buffer.getvalue()
    (size,) = struct.unpack_from(form, content, start)
    after = start + struct.calcsize(form)
    return content[:start] + struct.pack(form, len(value)) + value + content[after + size :]
