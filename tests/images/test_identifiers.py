"""Nobody is named: no identifier of any DICOM file stands in an output, a log, an error, a converted or an answer file.

The files are pydicom's own, and planted ones whose identifiers stand in every place that a file has for them, whole and
damaged. They are read under neutral names.
"""

import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from llava.errors import LlavaError
from llava.images import open_image
from tests.images.test_medical import HOUNSFIELD, dicom
from tests.tiny import make_llava

pydicom = pytest.importorskip("pydicom", reason="pydicom isn't installed (extra medical)")

from pydicom.data import get_testdata_files  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402

FIELDS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "OtherPatientIDs", "OtherPatientNames",
    "InstitutionName", "InstitutionAddress", "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName",
    "AccessionNumber", "StudyDate", "SeriesDate", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID",
    "FrameOfReferenceUID", "StationName", "DeviceSerialNumber", "RequestingPhysician", "PatientComments",
)  # fmt: skip
PLANTED = {
    "PatientName": "Unmistakable^Person", "PatientID": "ID-4711-0815", "PatientBirthDate": "19010203",
    "PatientAddress": "17 Hidden Lane", "InstitutionName": "Hospital of Nowhere", "AccessionNumber": "ACC998877",
    "StudyDate": "19991231", "StudyInstanceUID": "1.2.840.99999.1.4711", "SeriesInstanceUID": "1.2.840.99999.2.4711",
    "ReferringPhysicianName": "Doctor^Undisclosed", "PatientComments": "lives at Hidden Lane",
    "StudyDescription": "of Mr Unmistakable", "SeriesDescription": "Unmistakable, chest",
    "ImageComments": "Unmistakable",
    "ProtocolName": "for Unmistakable", "StationName": "NOWHERE1", "DeviceSerialNumber": "SN-55443322",
    "BodyPartExamined": "UNMISTAKABLE", "WindowCenterWidthExplanation": "Unmistakable",
}  # fmt: skip


def planted() -> dict[str, bytes]:
    """Sound and damaged files that hold `PLANTED`, also in private elements, sequences and the preamble."""
    item = Dataset()
    item.PatientName, item.PatientID = PLANTED["PatientName"], PLANTED["PatientID"]
    dataset = {**PLANTED, "OtherPatientIDsSequence": [item], "WindowCenter": 40, "WindowWidth": 400, "Modality": "CT"}
    sound = dicom(HOUNSFIELD, **dataset)
    sound = PLANTED["PatientName"].encode().ljust(128, b"\0") + sound[128:]
    found = {"sound": sound, "burned": dicom(HOUNSFIELD, **dataset, BurnedInAnnotation="YES")}
    found["frames"] = dicom(np.stack([HOUNSFIELD] * 3), **dataset)
    generator = np.random.default_rng(4)
    for number in range(40):
        damaged = bytearray(sound)
        for place in generator.integers(128, 1500, 3):
            damaged[place] = generator.integers(256)
        found[f"damaged{number}"] = bytes(damaged[: int(generator.integers(300, len(damaged)))])
    return found


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> dict[Path, set[str]]:
    """{file: what it mustn't say}."""
    folder = tmp_path_factory.mktemp("scans")
    found: dict[Path, set[str]] = {}
    for source in sorted(get_testdata_files()):
        if Path(source).is_file():
            path = folder / f"{len(found):04d}.dcm"
            shutil.copyfile(source, path)
            found[path] = identifiers(path)
    secrets = {part for value in PLANTED.values() for part in (value, *re.split(r"[\^ ,]", value)) if len(part) > 5}
    for content in planted().values():
        path = folder / f"{len(found):04d}.dcm"
        path.write_bytes(content)
        found[path] = secrets
    assert len(found) > 140 and sum(bool(secrets) for secrets in found.values()) > 100
    return found


def identifiers(path: Path) -> set[str]:
    """All values in a file that could tell whose it is, at any depth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True)
            elements = list(dataset.iterall())
        except Exception:  # noqa: BLE001 - no DICOM at all
            return set()
        values: set[str] = set()
        for element in elements:
            try:
                if element.keyword in FIELDS or element.VR == "PN":
                    values.update(map(str, element.value if element.VM > 1 else [element.value]))
            except Exception:  # noqa: BLE001 - a value that can't be read can't be said either
                continue
    return {value for value in values if len(value) > 5 and len(set(value)) > 3}


def names_nobody(texts: dict[str, str], scans: dict[Path, set[str]]) -> None:
    secrets = {secret: path for path, own in scans.items() for secret in own}
    for place, text in texts.items():
        for secret, path in secrets.items():
            assert secret not in text, f"{place} says {secret!r} of {path}"


def run(*words) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done


def test_looking_into_files(scans, tmp_path):
    done = run("llava.images.info", *scans, "--json", tmp_path / "found.json", "--save", tmp_path / "seen")
    assert done.returncode == 2 and len(json.loads((tmp_path / "found.json").read_text())) == len(scans)
    saved = {str(path): path.read_bytes().decode("latin-1") for path in (tmp_path / "seen").iterdir()}
    assert len(saved) > 60
    names_nobody({"info": done.stdout + done.stderr, "json": (tmp_path / "found.json").read_text(), **saved}, scans)


def test_converted_files(scans, tmp_path):
    folder = next(iter(scans)).parent
    done = run("llava.images.convert", folder, "--output-dir", tmp_path / "out", "--slices", "all", "--workers", "1")
    assert done.returncode == 0, done.stderr
    written = {str(path): path.read_bytes().decode("latin-1") for path in (tmp_path / "out").rglob("*.*")}
    assert len(written) > 60 and any("left_out" in path for path in written)
    names = "\n".join(str(path.relative_to(tmp_path)) for path in (tmp_path / "out").rglob("*"))
    names_nobody({"convert": done.stdout + done.stderr, "names": names, **written}, scans)


def test_answer_files(scans, tmp_path):
    readable = [path for path in scans if opens(path)]
    questions = [
        {"question_id": number, "image": path.name, "text": "What is shown?", "answer_type": "OPEN"}
        for number, path in enumerate(readable)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    words = ["--model-path", make_llava(tmp_path / "model"), "--image-folder", readable[0].parent, "--device", "cpu"]
    words += ["--question-file", tmp_path / "questions.jsonl", "--answers-file", tmp_path / "answers.jsonl"]
    done = run("llava.eval.model_vqa", *words, "--max-new-tokens", "2")
    assert done.returncode == 0, done.stderr
    written = {str(path): path.read_text() for path in tmp_path.glob("answers*")}
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(readable) > 60
    names_nobody({"answering": done.stdout + done.stderr, **written}, scans)


def opens(path: Path) -> bool:
    try:
        return bool(open_image(path))
    except LlavaError:
        return False


def test_errors_and_logs(scans, caplog):
    """Of each file whole, cut off in many places, and with bytes changed."""
    texts = {}
    generator = np.random.default_rng(9)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in scans:
            content = path.read_bytes()[:200_000]
            for attempt in range(12):
                damaged = bytearray(content[: int(generator.integers(1, len(content) + 1))] if attempt % 2 else content)
                for place in generator.integers(0, len(damaged), attempt):
                    damaged[place] = generator.integers(256)
                try:
                    open_image(bytes(damaged))
                except LlavaError as error:
                    texts[str(error)] = str(error)
    logged = "\n".join(record.getMessage() for record in caplog.records)
    said = "\n".join(str(warning.message) for warning in caught)
    assert len(texts) > 20
    names_nobody({"logs": logged, "warnings": said, **texts}, scans)
