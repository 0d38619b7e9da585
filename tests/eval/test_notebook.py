"""The notebook runs from top to bottom on what run_eval_batch writes, and shows its numbers."""

import json
from pathlib import Path

import pytest

from llava.eval import run_eval_batch

NOTEBOOK = Path(__file__).resolve().parents[2] / "llava" / "notebook" / "run_eval_metrics.ipynb"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two answer files to the same questions, scored."""
    monkeypatch.chdir(tmp_path)
    data, runs = Path("data/vqa_rad"), Path("runs/vqa_rad")
    data.mkdir(parents=True)
    runs.mkdir(parents=True)
    records = [
        {
            "id": str(index),
            "conversations": [
                {"from": "human", "value": "Is it?"},
                {"from": "gpt", "value": "yes" if index % 2 else "left"},
            ],
            "answer_type": "CLOSED" if index % 2 else "OPEN",
        }
        for index in range(8)
    ]
    (data / "test.json").write_text(json.dumps(records))
    for name, text in (("a", "yes left"), ("b", "no")):
        lines = [json.dumps({"question_id": record["id"], "text": text}) for record in records]
        (runs / f"test-answer-file-{name}.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / run_eval_batch.RESULTS_FILE
    flags = ["--pred_file_parent_path", "runs/vqa_rad", "--gt_parent_path", "data", "--output", output.name]
    run_eval_batch.main([*flags, "--bootstrap-samples", "100"])
    return output


@pytest.mark.parametrize("folder", ["", "llava/notebook"])
def test_the_notebook_runs_and_shows_the_scores(results, monkeypatch, folder):
    nbformat = pytest.importorskip("nbformat", reason="the dev extra brings nbclient")
    nbclient = pytest.importorskip("nbclient", reason="the dev extra brings nbclient")
    pytest.importorskip("ipykernel", reason="the dev extra brings ipykernel")
    (results.parent / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(results.parent / folder)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored outputs go stale; clear them"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "Warning" not in text and "2 answer files" in text and "test-answer-file-a" in text
    assert "LLaVA-Med from Vicuna" in text
    assert "p (McNemar)" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
