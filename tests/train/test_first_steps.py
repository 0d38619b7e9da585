"""The notebook of first steps runs from top to bottom: load, ask about a DICOM file, fine-tune 20 steps."""

import numpy as np
import pytest

from tests.documented_commands import ROOT
from tests.tiny import make_llava
from tests.train.helpers import make_records

NOTEBOOK = ROOT / "llava" / "notebook" / "first_steps.ipynb"


def write_scan(path) -> None:
    """A CT slice of a gradient."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    scan = Dataset()
    scan.file_meta = FileMetaDataset()
    scan.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    scan.file_meta.MediaStorageSOPClassUID = scan.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    scan.file_meta.MediaStorageSOPInstanceUID = scan.SOPInstanceUID = generate_uid()
    scan.Modality, scan.PhotometricInterpretation = "CT", "MONOCHROME2"
    scan.Rows = scan.Columns = 64
    scan.SamplesPerPixel, scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.PixelRepresentation = 1, 16, 16, 15, 1
    scan.RescaleSlope, scan.RescaleIntercept = 1, 0
    scan.PixelData = np.tile(np.linspace(-200, 300, 64).astype("<i2"), (64, 1)).tobytes()
    scan.save_as(path, enforce_file_format=True)


def test_the_notebook_loads_asks_and_trains(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="the dev extra brings nbclient")
    nbclient = pytest.importorskip("nbclient", reason="the dev extra brings nbclient")
    pytest.importorskip("ipykernel", reason="the dev extra brings ipykernel")
    pytest.importorskip("pydicom", reason="the medical extra brings pydicom")
    records = make_records(tmp_path / "data")
    write_scan(tmp_path / "scan.dcm")
    named = {"MODEL": make_llava(tmp_path / "base"), "SCAN": tmp_path / "scan.dcm", "OUTPUT": tmp_path / "out"}
    named |= {"RECORDS": records, "IMAGES": records.parent / "images"}
    for name, value in named.items():
        monkeypatch.setenv(f"LLAVA_{name}", str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored outputs go stale; clear them"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    assert "answer:" in text and "steps: 20" in text and "after 20 steps:" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "out" / "adapter_config.json").is_file()
