"""The notebook of first steps runs from top to bottom: load, ask about a DICOM file, fine-tune 20 steps."""

import pytest

from tests.documented_commands import ROOT
from tests.tiny import make_llava
from tests.train.helpers import make_records

NOTEBOOK = ROOT / "llava" / "notebook" / "first_steps.ipynb"


def test_the_notebook_loads_asks_and_trains(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="the dev extra brings nbclient")
    nbclient = pytest.importorskip("nbclient", reason="the dev extra brings nbclient")
    pytest.importorskip("ipykernel", reason="the dev extra brings ipykernel")
    pytest.importorskip("pydicom", reason="the medical extra brings pydicom")
    records = make_records(tmp_path / "data")
    named = {"MODEL": make_llava(tmp_path / "base"), "OUTPUT": tmp_path / "out"}  # the scan is the notebook's own
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
    assert not [text for output in outputs if "Warning" in (text := output.get("text", ""))]
    assert not [output for output in outputs if "text/html" in output.get("data", {})]  # no bar beside our own
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "out" / "adapter_config.json").is_file()
