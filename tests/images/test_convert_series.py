"""`python -m llava.images.convert`: series found and sorted, slices chosen, nobody named."""

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llava.data.convert import main as convert_data
from llava.errors import LlavaError
from llava.images import open_image
from llava.images.convert import Choice, main, parse_slices
from llava.images.headers import inflating
from llava.images.series import survey

pydicom = pytest.importorskip("pydicom", reason="pydicom isn't installed (extra medical)")
nibabel = pytest.importorskip("nibabel", reason="nibabel isn't installed (extra medical)")

CT = Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm"
SECRETS = ("DOE^JANE", "PATIENT-7", "19500203", "St. Example")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """A chest CT of nine slices in a disorderly folder, one of another patient, a volume, and what can't be used."""
    root = tmp_path_factory.mktemp("hospital") / "DOE^JANE"
    series = pydicom.uid.generate_uid()
    order = np.random.default_rng(0).permutation(9)
    for name, place in enumerate(order):
        write(root / "study" / f"{name}.dcm", series, float(place), "CHEST", fill=int(place) * 20)
    write(root / "study" / "other.dcm", pydicom.uid.generate_uid(), 0.0, "HEAD", fill=7)
    burned = write(root / "burned.dcm", pydicom.uid.generate_uid(), 0.0, "CHEST", fill=9)
    header = pydicom.dcmread(burned)
    header.BurnedInAnnotation = "YES"
    header.save_as(burned)
    (root / "notes.txt").write_text("DOE^JANE")
    (root / "broken.dcm").write_bytes(CT.read_bytes()[:900])
    nibabel.save(
        nibabel.Nifti1Image(np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6), np.eye(4)), root / "v.nii.gz"
    )
    return root


def write(path, series, place, part, fill):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = pydicom.dcmread(CT)
    header.PatientName, header.PatientID, header.PatientBirthDate, header.InstitutionName = SECRETS
    header.SeriesInstanceUID, header.BodyPartExamined = series, part
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, place]
    values = header.pixel_array.copy()
    values[:8] = fill
    header.PixelData = values.tobytes()
    header.save_as(path)
    return path


def convert(hospital, output, *words):
    main([str(hospital), "--output-dir", str(output), "--workers", "1", *words])
    return json.loads((output / "records.json").read_text())


def test_series_are_sorted_by_place(hospital):
    found = survey(hospital)
    assert sorted(len(series.slices) for series in found.series) == [1, 6, 9]
    chest = max(found.series, key=lambda series: len(series.slices))
    places = [float(pydicom.dcmread(one.path).ImagePositionPatient[2]) for one in chest.slices]
    assert places == sorted(places) and (chest.modality, chest.body_part, chest.preset) == ("CT", "CHEST", "lung")
    assert len(found.left_out) == 3 and "burnt" in str([reason for _, reason in found.left_out])
    assert sorted(len(series.slices) for series in survey(hospital, keep_burned_in=True).series) == [1, 1, 6, 9]


def test_a_record_for_each_series(hospital, tmp_path, capsys):
    records = convert(hospital, tmp_path / "out", "--question", "Is there a nodule?")
    assert len(records) == 3
    for record in records:
        (name,) = record["images"]
        assert (tmp_path / "out" / "images" / name).is_file() and name.startswith(record["id"])
        assert record["conversations"][0]["value"] == "<image>\nIs there a nodule?"
    chest = next(record for record in records if record["scan"]["of"] == 9)
    assert chest["scan"] == {"window": "lung", "modality": "CT", "body_part": "CHEST", "of": 9, "slices": [[4]]}
    source = next(one for one in survey(hospital).series if len(one.slices) == 9).slices[4]
    shown = np.asarray(Image.open(tmp_path / "out" / "images" / chest["images"][0]))
    assert np.array_equal(shown, np.asarray(open_image(source.path, window="lung")))
    said = capsys.readouterr().out
    assert "3 series, 3 images" in said and "left out: 1 × neither DICOM nor NIfTI" in said
    assert [set(entry) for entry in left_out(tmp_path / "out")] == [{"number", "why", "sha256"}] * 3


def left_out(output):
    return [json.loads(line) for line in (output / "left_out.jsonl").read_text().splitlines()]


def test_which_files_were_left_out(hospital, tmp_path):
    """By their digests; by their paths where that is asked for."""
    for number in (1, 2):
        broken = pydicom.dcmread(CT)
        broken.SeriesInstanceUID, broken.PixelData = "1.2.3", b"x" * number
        (hospital / "study" / f"cut{number}.dcm").unlink(missing_ok=True)
        broken.save_as(hospital / "study" / f"cut{number}.dcm")
    convert(hospital, tmp_path / "plain", "--slices", "all")
    digests = {hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in hospital.rglob("*") if path.is_file()}
    plain = left_out(tmp_path / "plain")
    assert [entry["number"] for entry in plain] == [1, 2, 3, 4, 5]
    assert len({entry["sha256"] for entry in plain} & digests) == 5
    assert not any(secret in str(plain) for secret in SECRETS) and "study" not in str(plain)
    convert(hospital, tmp_path / "named", "--slices", "all", "--name-files")
    assert {entry["file"] for entry in left_out(tmp_path / "named")} == {
        "broken.dcm", "burned.dcm", "notes.txt", "study/cut1.dcm", "study/cut2.dcm",
    }  # fmt: skip
    for number in (1, 2):
        (hospital / "study" / f"cut{number}.dcm").unlink()


def test_links_devices_and_pipes_are_left_out(tmp_path):
    """A link may lead out of the folder that was named, and a pipe has no end."""
    folder, outside = tmp_path / "scans", write(tmp_path / "other" / "a.dcm", "1.2.3", 0.0, "CHEST", fill=1)
    write(folder / "a.dcm", "1.2.4", 0.0, "CHEST", fill=2)
    (folder / "link.dcm").symlink_to(outside)
    (folder / "device.dcm").symlink_to("/dev/zero")
    (folder / "elsewhere").symlink_to(outside.parent)
    os.mkfifo(folder / "pipe.dcm")
    assert len(convert(folder, tmp_path / "out", "--name-files")) == 1
    entries = left_out(tmp_path / "out")
    assert [entry["file"] for entry in entries] == ["device.dcm", "elsewhere", "link.dcm", "pipe.dcm"]
    assert all(entry["sha256"] is None and entry["why"].startswith("a link, a device") for entry in entries)


def test_a_folder_that_cannot_be_read_is_left_out(tmp_path, capsys):
    """Here as its path is longer than the system takes."""
    folder = tmp_path / "scans"
    write(folder / "a.dcm", "1.2.4", 0.0, "CHEST", fill=2)
    here = os.open(folder, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("x" * 250, dir_fd=here)
        above, here = here, os.open("x" * 250, os.O_RDONLY, dir_fd=here)
        os.close(above)
    os.close(here)
    assert len(convert(folder, tmp_path / "out")) == 1
    (entry,) = left_out(tmp_path / "out")
    assert entry["why"] == "a folder that can't be read (File name too long)" and entry["sha256"] is None
    assert "left out: 1 × a folder that can't be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("slices", "images", "size"), [("all", 9, (128, 128)), ("every 4", 3, (128, 128)), ("montage 2x3", 1, (384, 256))]
)
def test_slices(hospital, tmp_path, slices, images, size):
    records = convert(hospital, tmp_path / "out", "--slices", slices, "--window", "40,400")
    chest = next(record for record in records if record["scan"]["of"] == 9)
    assert len(chest["images"]) == images and chest["scan"]["window"] == [40, 400]
    assert Image.open(tmp_path / "out" / "images" / chest["images"][0]).size == size


@pytest.mark.parametrize("axis", [0, 2])
def test_a_volume_is_unpacked_once_for_all_its_slices(tmp_path, monkeypatch, axis):
    values = np.random.default_rng(5).integers(0, 900, (10, 11, 12)).astype(np.int16)
    path = tmp_path / "scans" / "volume.nii.gz"
    path.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-1.0, 1.0, -1.0, 1.0])), path)
    unpacked, unpacker = [], inflating.zlib.decompressobj
    monkeypatch.setattr(inflating.zlib, "decompressobj", lambda **how: unpacked.append(how) or unpacker(**how))
    (record,) = convert(path.parent, tmp_path / "out", "--slices", "all", "--axis", str(axis))
    assert len(unpacked) == 2, "once to count its slices, once to draw them"
    assert len(record["images"]) == values.shape[axis]
    for place, image in enumerate(record["images"]):
        shown = Image.open(tmp_path / "out" / "images" / image)
        assert (np.asarray(shown) == np.asarray(open_image(path, frame=place, axis=axis))).all()


def test_the_slices_before_a_cut_are_drawn(tmp_path):
    path = tmp_path / "scans" / "volume.nii.gz"
    path.parent.mkdir()
    values = np.random.default_rng(5).integers(0, 900, (40, 40, 20)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 4])
    (record,) = convert(path.parent, tmp_path / "out", "--slices", "all")
    assert 11 <= len(record["images"]) < 20
    assert {entry["why"] for entry in left_out(tmp_path / "out")} == {"the compressed data is cut off"}


def test_a_disk_without_room_to_unpack_ends_the_command(tmp_path, monkeypatch):
    path = tmp_path / "scans" / "volume.nii.gz"
    path.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), path)

    class Full(io.BytesIO):
        def write(self, piece):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(inflating.tempfile, "TemporaryFile", Full)
    with pytest.raises(LlavaError, match=r"^\S+volume\.nii\.gz: no room to unpack it in .*set TMPDIR to another"):
        main([str(path.parent), "--output-dir", str(tmp_path / "out"), "--slices", "all"])
    assert not (tmp_path / "out").exists()


def test_a_write_that_failed_once_is_not_gone_on_from(monkeypatch):
    """The next piece would lie where the lost one belongs."""
    content = np.random.default_rng(0).bytes(200_000)
    unpacked = inflating.Unpacked(io.BytesIO(gzip.compress(content, 1)), "a.nii.gz")

    def full(piece):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(unpacked, "_store", SimpleNamespace(write=full, seek=unpacked._store.seek))
    with pytest.raises(inflating.NoRoom):
        unpacked.read(10)
    monkeypatch.undo()
    with pytest.raises(inflating.NoRoom):
        unpacked.read(10)


def test_names_depend_on_the_images_alone(hospital, tmp_path):
    first = convert(hospital, tmp_path / "a")
    main([str(hospital / "study"), "--output-dir", str(tmp_path / "b"), "--workers", "2"])
    second = json.loads((tmp_path / "b" / "records.json").read_text())
    assert {record["id"] for record in second} < {record["id"] for record in first}


def test_nobody_is_named(hospital, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "llava.images.convert",
            str(hospital),
            "--output-dir",
            str(tmp_path / "out"),
            "--slices",
            "all",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    uids = [str(pydicom.dcmread(path)[tag].value) for path in hospital.rglob("*.dcm") if path.name != "broken.dcm"
            for tag in ("SeriesInstanceUID", "SOPInstanceUID", "StudyInstanceUID")]  # fmt: skip
    assert len(written) > 10
    for secret in (*SECRETS, *uids):
        assert secret not in done.stdout + done.stderr
        for path, content in written.items():
            assert secret.encode() not in content and secret not in str(path.relative_to(tmp_path))


@pytest.mark.parametrize("slices", ["every 3", "montage 1x2"])
def test_each_image_can_be_joined_with_a_table_of_ones_own(hospital, tmp_path, slices):
    """By the path of its file; the list is private, and not in the set."""
    path = tmp_path / "sources.csv"
    records = convert(hospital, tmp_path / "out", "--slices", slices, "--sources", str(path))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert path.stat().st_mode & 0o777 == 0o600 and not (tmp_path / "out" / path.name).exists()
    assert {row["image"] for row in rows} == {image for record in records for image in record["images"]}
    assert len(rows) == sum(len(places) for record in records for places in record["scan"]["slices"])
    for row in rows:
        assert (hospital / row["file"]).is_file() and (row["frame"] != "") == row["file"].endswith(".nii.gz")
    chest = next(record for record in records if record["scan"]["of"] == 9)
    places = [place for image in chest["scan"]["slices"] for place in image]
    files = [row["file"] for row in rows if row["image"] in chest["images"]]
    heights = sorted(float(pydicom.dcmread(hospital / file).ImagePositionPatient[2]) for file in files)
    assert heights == sorted(map(float, places))
    convert(hospital, tmp_path / "again", "--slices", slices, "--sources", str(path))  # the same again is fine
    with pytest.raises(LlavaError, match=r"sources\.csv is there and holds something else"):
        convert(hospital, tmp_path / "other", "--slices", "all", "--sources", str(path))
    assert not (tmp_path / "other").exists()
    with pytest.raises(LlavaError, match="would name patients in the set; give a path outside --output-dir"):
        convert(hospital, tmp_path / "inside", "--sources", str(tmp_path / "inside" / "sources.csv"))


def test_a_table_to_fill_in(hospital, tmp_path):
    """Filled in, it converts into records of these images; the cells stand empty, or hold --question."""
    path = tmp_path / "my.csv"
    records = convert(hospital, tmp_path / "out", "--slices", "every 3", "--table", str(path))
    images = sorted(image for record in records for image in record["images"])
    assert path.read_text().splitlines() == ["image,question,answer", *(f"{image},," for image in images)]
    path.write_text(path.read_text().replace(",,\n", ",Seen?,yes\n", 2))
    to = tmp_path / "vqa"
    convert_data(["csv", "--input", str(path), "--image-folder", str(tmp_path / "out/images"), "--output-dir", str(to)])
    assert [record["image"] for record in json.loads((to / "train.json").read_text())] == images[:2]
    asked = tmp_path / "asked.csv"
    convert(hospital, tmp_path / "again", "--question", "Seen?", "--table", str(asked))
    assert all(row["question"] == "Seen?" and not row["answer"] for row in csv.DictReader(asked.open(newline="")))
    with pytest.raises(LlavaError, match="give a path outside --output-dir"):
        convert(hospital, tmp_path / "inside", "--table", str(tmp_path / "inside" / "my.csv"))


def test_two_tables_are_two_files(hospital, tmp_path):
    """The private list of sources was replaced by the other table, once all had been drawn."""
    both = str(tmp_path / "both.csv")
    with pytest.raises(LlavaError, match=r"--table .*both\.csv: it is read, or written by another flag"):
        convert(hospital, tmp_path / "out", "--sources", both, "--table", both, "--overwrite")
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_refused_leaves_nothing_written(hospital, tmp_path):
    sources, table, blocked = tmp_path / "sources.csv", tmp_path / "my.csv", tmp_path / "my.csv" / "in a file.csv"
    table.write_text("mine")
    for wrong, flags, said in (
        (table, (), "is there and holds something else"),
        (blocked, ("--overwrite",), "Not a directory|File exists"),
        (tmp_path, ("--overwrite",), "is a folder; give the name of a file"),
    ):
        with pytest.raises(LlavaError, match=said):
            convert(hospital, tmp_path / "out", "--sources", str(sources), "--table", str(wrong), *flags)
        assert [path.name for path in tmp_path.iterdir()] == ["my.csv"] and table.read_text() == "mine"


def test_no_name_of_a_file_is_a_formula(tmp_path):
    folder = tmp_path / "scans"
    for place, name in enumerate(("=1+1.dcm", "+1.dcm", "-1.dcm", "@x.dcm", "plain.dcm")):
        write(folder / name, pydicom.uid.generate_uid(), 0.0, "CHEST", fill=300 * place)
    convert(folder, tmp_path / "out", "--sources", str(tmp_path / "sources.csv"))
    with (tmp_path / "sources.csv").open(newline="") as file:
        found = {row["file"] for row in csv.DictReader(file)}
    assert found == {"'=1+1.dcm", "'+1.dcm", "'-1.dcm", "'@x.dcm", "plain.dcm"}


def test_a_name_that_is_not_utf_8_is_written_too(tmp_path):
    folder = tmp_path / "scans"
    write(folder / "a.dcm", pydicom.uid.generate_uid(), 0.0, "CHEST", fill=300)
    (folder / "a.dcm").rename(os.fsdecode(os.fsencode(folder) + b"/m\xfcller.dcm"))
    convert(folder, tmp_path / "out", "--sources", str(tmp_path / "sources.csv"))
    assert ",m\ufffdller.dcm," in (tmp_path / "sources.csv").read_text("utf-8")


def test_choices():
    assert Choice().of(5) == [2] and Choice(every=2).of(5) == [0, 2, 4]
    assert Choice(rows=2, columns=2).of(8) == [1, 3, 5, 7] and Choice(rows=2, columns=2).of(2) == [0, 1]
    for text in ("first", "every 0", "montage 0x2", "every"):
        with pytest.raises(LlavaError, match="--slices"):
            parse_slices(text)


def test_mistakes(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    with pytest.raises(LlavaError, match=r"no series that can be used \(left out: 1 × "):
        main([str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(LlavaError, match="isn't empty"):
        main([str(tmp_path / "in"), "--output-dir", str(tmp_path / "full")])
    main_words = [str(CT.parent / "CT_small.dcm"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(LlavaError, match="is not a folder"):
        main(main_words)
    (tmp_path / "in" / "ct.dcm").write_bytes(CT.read_bytes())
    main([str(tmp_path / "in"), "--output-dir", str(tmp_path / "full"), "--overwrite", "--axis", "0"])
    assert (tmp_path / "full" / "records.json").is_file()
