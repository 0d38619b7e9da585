"""DICOM and NIfTI: what a reader is meant to see, nothing of the patient, no bombs."""

import gzip
import io
import logging
import warnings

import numpy as np
import pytest

from llava.errors import LlavaError
from llava.images import Limits, describe_image, open_image

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian  # noqa: E402

PATIENT = "Unmistakable^Person"


def dicom(values: np.ndarray, **tags) -> bytes:
    """A DICOM file around `values` [rows, columns], [frames, rows, columns] or [rows, columns, 3]."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = PATIENT, "ID-4711", "19010203"
    colour = values.ndim == 3 and values.shape[-1] == 3
    rows_columns = values.shape[:2] if colour else values.shape[-2:]
    dataset.Rows, dataset.Columns = rows_columns
    if values.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(values)
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = values.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def grey(content, **options) -> np.ndarray:
    pixels = np.asarray(open_image(content, **options))
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


HOUNSFIELD = np.arange(-1000, 1000, dtype=np.int16).reshape(40, 50)


def test_rescale_then_window():
    stored = (HOUNSFIELD + 1024).astype(np.uint16)
    content = dicom(stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    expected = np.clip((HOUNSFIELD - (39.5 - 199.5)) / 399 * 255, 0, 255)
    assert np.abs(grey(content) - expected).max() <= 0.51


@pytest.mark.parametrize(("name", "low", "high"), [("lung", -1350, 150), ("bone", -500, 1300), ("stroke", 28, 36)])
def test_presets(name, low, high):
    content = dicom(HOUNSFIELD, WindowCenter=0, WindowWidth=10)
    shown = grey(content, window=name)
    assert (shown[low >= HOUNSFIELD] == 0).all()
    assert (shown[high <= HOUNSFIELD] == 255).all()
    assert abs(int(shown[round((low + high) / 2) == HOUNSFIELD][0]) - 128) <= 255 / (high - low) * 1.5


def test_several_windows_take_the_first_and_monochrome1_is_inverted():
    windows = {"WindowCenter": [0, 500], "WindowWidth": [100, 50]}
    first = grey(dicom(HOUNSFIELD, **windows))
    np.testing.assert_array_equal(first, grey(dicom(HOUNSFIELD, WindowCenter=0, WindowWidth=100)))
    inverted = grey(dicom(HOUNSFIELD, PhotometricInterpretation="MONOCHROME1", **windows))
    np.testing.assert_array_equal(inverted, 255 - first)


def test_voi_functions():
    exact = grey(dicom(HOUNSFIELD, WindowCenter=0, WindowWidth=200, VOILUTFunction="LINEAR_EXACT"))
    assert exact[HOUNSFIELD == -100] == 0 and exact[HOUNSFIELD == 100] == 255 and exact[HOUNSFIELD == 0] == 128
    sigmoid = grey(dicom(HOUNSFIELD, WindowCenter=0, WindowWidth=200, VOILUTFunction="SIGMOID"))
    assert sigmoid[HOUNSFIELD == 0] == 128 and 0 < sigmoid[HOUNSFIELD == -100] < 64


def test_without_a_window_the_values_fill_the_range():
    shown = grey(dicom((np.arange(2000).reshape(40, 50) + 100).astype(np.uint16)))
    assert shown.min() == 0 and shown.max() == 255 and abs(int(np.median(shown)) - 128) < 3


def test_voi_lut_is_used_when_there_is_no_chosen_window():
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 16], np.arange(65535, -1, -257, dtype="<u2").tobytes()
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(grey(dicom(values, VOILUTSequence=[table])), 255 - values)


def test_middle_frame_by_default():
    frames = np.stack([np.full((4, 4), level, np.uint8) for level in (10, 20, 30, 40, 50)])
    content = dicom(frames, WindowCenter=128, WindowWidth=256)
    assert grey(content)[0, 0] == 30
    assert grey(content, frame=0)[0, 0] == 10
    with pytest.raises(LlavaError, match="frame 5 doesn't exist"):
        open_image(content, frame=5)


def test_window_of_the_frames_group():
    group, window = Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 0, 100
    group.FrameVOILUTSequence = [window]
    content = dicom(HOUNSFIELD, SharedFunctionalGroupsSequence=[group])
    np.testing.assert_array_equal(grey(content), grey(dicom(HOUNSFIELD, WindowCenter=0, WindowWidth=100)))


def test_colour():
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(open_image(dicom(values))), values)


def test_a_window_that_a_colour_image_does_not_take_is_said(caplog):
    content = dicom(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    plain = np.asarray(open_image(content))
    assert not caplog.records and describe_image(content).shown == ["its colours"]
    np.testing.assert_array_equal(np.asarray(open_image(content, window="lung")), plain)
    assert [record.getMessage() for record in caplog.records] == [
        "a DICOM image is in colour; the window that was chosen isn't applied to it"
    ]
    assert describe_image(content, window="lung").shown == ["its colours, to which no window applies"]


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm",
        "SC_rgb_rle_2frame.dcm", "SC_rgb_jpeg_dcmtk.dcm", "examples_palette.dcm", "examples_ybr_color.dcm",
    ],
)  # fmt: skip
def test_real_files(name):
    """pydicom's own examples, compressed and multi-frame ones among them (those that it brings along)."""
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} isn't part of this pydicom")
    pixels = np.asarray(open_image(path))
    header = pydicom.dcmread(path, stop_before_pixels=True)
    assert pixels.shape == (header.Rows, header.Columns, 3)
    assert pixels.std() > 5


def test_lossless_compression_changes_nothing():
    plain = open_image(get_testdata_file("MR_small.dcm"))
    for name in ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_implicit.dcm"):
        np.testing.assert_array_equal(np.asarray(open_image(get_testdata_file(name))), np.asarray(plain))


def test_dicom_without_preamble_is_known_by_its_suffix(tmp_path):
    content = dicom(HOUNSFIELD, WindowCenter=0, WindowWidth=100)
    path = tmp_path / "x.dcm"
    dataset = pydicom.dcmread(io.BytesIO(content))
    bare = Dataset(dict(dataset))
    bare.save_as(path, implicit_vr=True, little_endian=True)
    assert path.read_bytes()[128:132] != b"DICM"
    assert open_image(path).size == (50, 40)


def test_nothing_of_the_patient_gets_out(caplog):
    good = dicom(HOUNSFIELD, WindowCenter=0, WindowWidth=100, BurnedInAnnotation="YES")
    broken = [good[:-100], good[: len(good) // 2], dicom(HOUNSFIELD, Rows=41), dicom(HOUNSFIELD, BitsAllocated=12)]
    place = good.index(PATIENT.encode())
    broken.append(good[:place] + b"\xff\xfe" * 4 + good[place + 8 :])
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = open_image(good)
        texts = [repr(image.info)]
        for content in broken:
            try:
                open_image(content)
            except LlavaError as error:
                texts.append(str(error))
    texts += [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in caught]
    assert not any("Unmistakable" in text or "4711" in text or "19010203" in text for text in texts)
    assert "burnt into its pixels" in caplog.text


def test_sizes_are_checked_before_the_pixels_are_read():
    content = dicom(HOUNSFIELD, Rows=60_000, Columns=60_000)
    with pytest.raises(LlavaError, match="60000 × 60000 pixels"):
        open_image(content)
    with pytest.raises(LlavaError, match="MiB of pixels"):
        open_image(dicom(HOUNSFIELD, NumberOfFrames=100_000_000))
    with pytest.raises(LlavaError, match="MiB of pixels"):
        open_image(dicom(HOUNSFIELD), limits=Limits(max_volume_bytes=1000))


def test_dicomdir_and_files_without_pixels_are_refused():
    with pytest.raises(LlavaError, match="DICOMDIR"):
        open_image(get_testdata_file("DICOMDIR"))
    with pytest.raises(LlavaError, match="without an image"):
        open_image(get_testdata_file("rtplan.dcm"))


def test_deeply_nested_sequences_are_one_error():
    nested = Dataset()
    for _ in range(200):
        outer = Dataset()
        outer.SharedFunctionalGroupsSequence = [nested]
        nested = outer
    content = dicom(HOUNSFIELD, SharedFunctionalGroupsSequence=[nested])
    try:
        assert open_image(content).size == (50, 40)
    except LlavaError as error:
        assert "\n" not in str(error)


def test_missing_decoder_names_syntax_and_package(monkeypatch):
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "is_available", False)
    with pytest.raises(LlavaError, match=r"JPEG 2000 .*pip install pylibjpeg pylibjpeg-openjpeg"):
        open_image(get_testdata_file("MR_small_jp2klossless.dcm"))
    with pytest.raises(LlavaError, match=r"JPEG Baseline .*pip install pylibjpeg pylibjpeg-libjpeg"):
        open_image(get_testdata_file("SC_rgb_jpeg_dcmtk.dcm"))


def volume(dtype=np.int16, affine=None) -> tuple[np.ndarray, bytes]:
    values = np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(dtype)
    return values, nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine).to_bytes()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_nifti_slice(axis, packed):
    values, content = volume()
    shown = grey(gzip.compress(content) if packed else content, axis=axis, window=(60, 120), frame=1)
    expected = np.flip(np.take(values, 1, axis).T)  # as stored x, y and z go to the right, the front and the head
    assert np.abs(shown - np.clip((expected - 0) / 119 * 255, 0, 255)).max() <= 1


def test_nifti_is_brought_to_one_orientation():
    values, plain = volume()
    turned = nibabel.Nifti1Image(values[::-1], np.diag([-1, 1, 1, 1])).to_bytes()
    np.testing.assert_array_equal(grey(turned), grey(plain))


@pytest.mark.parametrize(
    ("axis", "directions", "words"),
    [
        (0, [0, 1, 0, 0, 0, -1], "head is up, front is left"),
        (1, [1, 0, 0, 0, 0, -1], "head is up, the patient's left is right"),
        (2, [1, 0, 0, 0, 1, 0], "front is up, the patient's left is right"),
    ],
    ids=["sagittal", "coronal", "axial"],
)
def test_a_patient_looks_the_same_in_nifti_and_dicom(axis, directions, words):
    """A spot on his left, in front, near the head; `directions` as DICOM files are commonly stored."""
    body = np.zeros((8, 9, 10), np.int16)
    body[1, 6, 8] = 100  # RAS+
    content = nibabel.Nifti1Image(body, np.eye(4)).to_bytes()
    index = (1, 6, 8)[axis]
    # DICOM's axes go to the left, the back and the head.
    along = {"across": directions[:3], "down": directions[3:]}
    right, down = (np.array(each) * (-1, -1, 1) for each in along.values())
    rows, columns = body.shape[np.abs(down).argmax()], body.shape[np.abs(right).argmax()]
    start = np.array([1, 6, 8])
    for step in (right, down):
        place = np.abs(step).argmax()
        start[place] = 0 if step[place] > 0 else body.shape[place] - 1
    pixels = np.array([[body[tuple(start + down * y + right * x)] for x in range(columns)] for y in range(rows)])
    position = [float(value) for value in start * (-1, -1, 1)]
    scan = dicom(pixels.astype(np.int16), ImageOrientationPatient=directions, ImagePositionPatient=position)
    shown = grey(content, axis=axis, frame=index, window=(50, 100))
    np.testing.assert_array_equal(shown, grey(scan, window=(50, 100)))
    assert np.count_nonzero(shown) == 1
    assert describe_image(content, axis=axis).shown[-1] == f"turned upright: {words}"


def test_nifti_middle_slice_first_time_and_version_2():
    values, plain = volume()
    series = nibabel.Nifti1Image(np.stack([values, values * 0], -1), np.eye(4)).to_bytes()
    np.testing.assert_array_equal(grey(series), grey(plain))
    np.testing.assert_array_equal(grey(plain, frame=3), grey(plain))
    np.testing.assert_array_equal(grey(nibabel.Nifti2Image(values, np.eye(4)).to_bytes()), grey(plain))
    with pytest.raises(LlavaError, match="axial slice 6 doesn't exist"):
        open_image(plain, frame=6)


def test_nifti_bombs_and_damage():
    _, content = volume()
    # What follows the slice isn't unpacked at all; a slice behind it would be too far.
    far = nibabel.Nifti1Image(np.zeros((500, 500, 100), np.uint8), np.eye(4)).to_bytes()
    with pytest.raises(LlavaError, match="MiB would have to be unpacked"):
        open_image(gzip.compress(far), frame=99, limits=Limits(max_unpacked_bytes=1_000_000))
    assert open_image(gzip.compress(far), frame=3, limits=Limits(max_unpacked_bytes=1_100_000)).size == (500, 500)
    huge = bytearray(content)
    huge[42:48] = np.array([30000] * 3, "<i2").tobytes()
    with pytest.raises(LlavaError, match="MiB of pixels"):
        open_image(bytes(huge))
    for length in (348, 360, len(content) - 10):
        with pytest.raises(LlavaError):
            open_image(content[:length])
    with pytest.raises(LlavaError, match="without its volume"):
        open_image(content[:344] + b"ni1\0" + content[348:])


def test_wrong_windows():
    content = dicom(HOUNSFIELD)
    for window in ("liver", (1,), (0, 0), (0, -3), "40/80"):
        with pytest.raises(LlavaError, match="window"):
            open_image(content, window=window)
