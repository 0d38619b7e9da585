"""Images as they come from the field (public bug reports of other projects): each shows what it is meant to show."""

import gzip
import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llava.images import ImageError, open_image
from tests.images.test_medical import HOUNSFIELD, dicom, grey

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

from pydicom.dataset import Dataset  # noqa: E402

WINDOW = {"WindowCenter": 0, "WindowWidth": 400}
VALUES = np.random.default_rng(5).integers(0, 1000, (8, 10, 6)).astype(np.int16)
LAS = np.diag([-1.0, 1, 1, 1])


def nifti(values, affine=None, edit=None) -> bytes:
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    if edit:
        edit(image.header)
    return image.to_bytes()


def test_nifti_of_two_dimensions_is_one_slice_oriented():
    shown = grey(nifti(VALUES[..., 0], LAS))
    np.testing.assert_array_equal(shown, grey(nifti(VALUES[..., :1], LAS)))
    np.testing.assert_array_equal(shown, grey(nifti(VALUES[::-1, :, 0])))
    assert shown.shape == (10, 8)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nifti_orientations_are_nibabels_own(axis):
    """Turned, flipped and oblique affines; compared with nibabel's reordered volume."""
    generator = np.random.default_rng(axis)
    for case in range(20):
        turned = np.eye(3)[generator.permutation(3)] * generator.choice([-1, 1], 3)
        affine = np.eye(4)
        affine[:3, :3] = turned * generator.uniform(0.5, 3, 3) + generator.uniform(-0.2, 0.2, (3, 3)) * (case % 2)
        canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(VALUES, affine)).get_fdata()
        index = int(generator.integers(canonical.shape[axis]))
        expected = np.flip(np.take(canonical, index, axis).T)
        content = nifti(VALUES, affine)
        for packed in (content, gzip.compress(content)):
            shown = grey(packed, axis=axis, frame=index, window=(500, 1000))
            assert np.abs(shown - np.clip((expected - 0) / 999 * 255, 0, 255)).max() <= 1


def test_nifti_with_an_sform_without_z_takes_the_qform(caplog):
    content = bytearray(nifti(VALUES, LAS, lambda header: header.set_qform(LAS, code=1)))
    content[312:328] = bytes(16)
    with caplog.at_level(logging.WARNING):
        shown = grey(bytes(content))
    np.testing.assert_array_equal(shown, grey(nifti(VALUES, LAS)))
    assert "next best orientation" in caplog.text


def test_nifti_without_directions_is_taken_to_be_stored_from_right_to_left():
    bare = nifti(VALUES, LAS, lambda header: header.set_sform(None, 0) or header.set_qform(None, 0))
    np.testing.assert_array_equal(grey(bare), grey(nifti(VALUES, LAS)))


def test_complex_nifti_is_its_magnitude():
    turned = VALUES * np.exp(1j * np.linspace(0, 6, VALUES.size).reshape(VALUES.shape))
    shown = grey(nifti(turned.astype(np.complex64)), window=(500, 1000))
    assert np.abs(shown.astype(int) - grey(nifti(VALUES), window=(500, 1000))).max() <= 1


def test_nifti_of_several_gzip_members():
    content = nifti(VALUES)
    for parts in (2, 7):
        size = len(content) // parts + 1
        members = [gzip.compress(content[start : start + size]) for start in range(0, len(content), size)]
        np.testing.assert_array_equal(grey(b"".join(members) + bytes(100)), grey(content))
    with pytest.raises(ImageError, match="cut off"):
        open_image(b"".join(members)[: len(members[0]) + 30])


def test_nifti_offset_of_zero_is_right_behind_the_header():
    content = bytearray(nifti(VALUES))
    content[108:112] = struct.pack("<f", 0)
    np.testing.assert_array_equal(grey(bytes(content)), grey(nifti(VALUES)))


def test_big_endian_nifti():
    content = nibabel.Nifti1Image(VALUES, np.eye(4)).header.as_byteswapped(">").binaryblock
    whole = content + bytes(4) + VALUES.astype(">i2").tobytes(order="F")
    np.testing.assert_array_equal(grey(whole), grey(nifti(VALUES)))


@pytest.mark.parametrize("item", ["no item", "no data"])
def test_voi_table_that_is_none_leaves_the_window(item):
    table = Dataset()
    table.LUTDescriptor = [256, 0, 16]
    content = dicom(HOUNSFIELD, VOILUTSequence=[] if item == "no item" else [table], **WINDOW)
    np.testing.assert_array_equal(grey(content), grey(dicom(HOUNSFIELD, **WINDOW)))


def test_rescale_without_a_value_changes_nothing():
    for tags in ({"RescaleSlope": None}, {"RescaleIntercept": None}, {"RescaleSlope": None, "RescaleIntercept": None}):
        content = dicom(HOUNSFIELD, **tags, **WINDOW)
        np.testing.assert_array_equal(grey(content), grey(dicom(HOUNSFIELD, **WINDOW)))
        np.testing.assert_array_equal(grey(content, window="bone"), grey(dicom(HOUNSFIELD), window="bone"))
    shifted = dicom(HOUNSFIELD, RescaleSlope=None, RescaleIntercept=100, WindowCenter=100, WindowWidth=400)
    np.testing.assert_array_equal(grey(shifted), grey(dicom(HOUNSFIELD, **WINDOW)))


@pytest.mark.parametrize("window", [{}, WINDOW])
@pytest.mark.parametrize("limit", [None, -998])
def test_padding_is_black_where_low_values_are_white(window, limit):
    tags = {"PixelPaddingValue": -1000} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    shown = grey(dicom(HOUNSFIELD, PhotometricInterpretation="MONOCHROME1", **tags, **window))
    is_padding = (limit or -1000) >= HOUNSFIELD
    assert (shown[is_padding] == 0).all()
    assert shown[HOUNSFIELD == -990][0] > 250 and shown[HOUNSFIELD == 990][0] < 5


@pytest.mark.parametrize("window", [{}, WINDOW])
def test_padding_of_a_high_value_is_black_where_high_values_are_white(window):
    shown = grey(dicom(HOUNSFIELD, PixelPaddingValue=int(HOUNSFIELD.max()), **window))
    assert (shown[HOUNSFIELD.max() == HOUNSFIELD] == 0).all()
    assert shown[HOUNSFIELD == 990][0] > 250


@pytest.mark.parametrize("is_implicit", [True, False])
@pytest.mark.parametrize("has_meta", [True, False])
def test_dicom_without_preamble_is_known_by_its_content(is_implicit, has_meta, tmp_path):
    whole = dicom(HOUNSFIELD, **WINDOW)
    if has_meta:
        content = whole[132:]
    else:
        buffer = io.BytesIO()
        Dataset(dict(pydicom.dcmread(io.BytesIO(whole)))).save_as(buffer, implicit_vr=is_implicit, little_endian=True)
        content = buffer.getvalue()
    path = tmp_path / "no-suffix"
    path.write_bytes(content)
    for source in (content, path):
        np.testing.assert_array_equal(grey(source), grey(whole))


def test_whole_colours_called_shared_ones_are_refused():
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    with pytest.raises(ImageError, match=r"YBR_FULL_422.*correct PhotometricInterpretation"):
        open_image(dicom(values, PhotometricInterpretation="YBR_FULL_422"))
    shared = dicom(values, PhotometricInterpretation="YBR_FULL_422", PixelData=bytes([100, 150, 128, 128]) * 24)
    np.testing.assert_array_equal(np.asarray(open_image(shared))[0, :2, 0], [100, 150])


@pytest.mark.parametrize("keyword", ["Rows", "BitsStored", "PixelRepresentation"])
def test_a_number_of_three_bytes_is_one_plain_error(keyword):
    content = dicom(HOUNSFIELD)
    tag = pydicom.tag.Tag(keyword)
    head = struct.pack("<HH2sH", tag.group, tag.element, b"US", 2)
    place = content.index(head)
    value = content[place + 8 : place + 10]
    wrong = content[: place + 6] + struct.pack("<H", 3) + value + b"\xab" + content[place + 10 :]
    with pytest.raises(ImageError) as caught:
        open_image(wrong)
    text = str(caught.value)
    assert "\n" not in text and "\\x" not in text and "0028" not in text
    assert keyword in text
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"tEXt"])
def test_png_with_large_metadata(kind):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    data = buffer.getvalue()
    large = np.random.default_rng(1).integers(65, 70, 3 << 20, dtype=np.uint8).tobytes()
    value = b"name\0" + (b"\0" + zlib.compress(large) if kind != b"tEXt" else large)
    chunk = struct.pack(">L", len(value)) + kind + value + struct.pack(">L", zlib.crc32(kind + value))
    np.testing.assert_array_equal(np.asarray(open_image(data[:33] + chunk + data[33:])), image)
    with pytest.raises(ImageError, match="MiB of metadata"):
        open_image(data[:33] + chunk * (1 + (64 << 20) // len(chunk)) + data[33:])


def test_the_files_from_the_field(shared_dir):
    """The same with the files that showed it; N00 is the volume that most of them hold."""
    folder = shared_dir / "field" / "pictures"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    reference = np.asarray(open_image(folder / "N00_reference.nii.gz"))
    for name in ("N03_complex64", "N04_two_gzip_members", "N05_sform_without_z", "N07_vox_offset_0"):
        shown = np.asarray(open_image(folder / f"{name}.nii.gz")).astype(int)
        assert np.abs(shown - reference).max() <= 1, name
    assert open_image(folder / "N02_2d_las.nii.gz").size == (80, 64)
    for name in ("D01_voilut_no_items", "D02_voilut_item_without_data", "D03_rescale_without_value"):
        shown = np.asarray(open_image(folder / f"{name}.dcm"))
        np.testing.assert_array_equal(shown, np.asarray(open_image((folder / "D08_no_preamble.dcm").read_bytes())))
    padded = pydicom.dcmread(folder / "D07_monochrome1_padding.dcm")
    for options in ({}, {"window": (500, 1000)}):
        shown = grey(folder / "D07_monochrome1_padding.dcm", **options)
        assert (shown[padded.pixel_array == padded.PixelPaddingValue] == 0).all()
    for name in ("D17_rgb_called_ybr422", "D21_short_of_3_bytes"):
        with pytest.raises(ImageError):
            open_image(folder / f"{name}.dcm")
    assert np.asarray(open_image(folder / "P01_png_large_profile.png")).std() > 5


def test_deflated_dicom_equals_the_plain_one():
    plain = dicom(HOUNSFIELD, **WINDOW)
    dataset = pydicom.dcmread(io.BytesIO(plain))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert buffer.getvalue()[-200:] != plain[-200:]
    np.testing.assert_array_equal(grey(buffer.getvalue()), grey(plain))
