"""The reproduction script with small stand-ins, and the table that it ends with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.eval import paper_table
from tests.tiny import make_llava, make_llm

ROOT = Path(__file__).resolve().parents[2]


def result(path, open_value, closed_value, counts=(179, 272)):
    numbers = {"recall": {"value": open_value}, "yes/no accuracy": {"value": closed_value}}
    path.write_text(json.dumps({"open": counts[0], "closed": counts[1], "paper": numbers}))
    return path


def test_each_cell_has_expected_value_ours_and_tolerance(tmp_path, capsys):
    file = result(tmp_path / "scores.json", 64.0, 50.0)
    assert not paper_table.main(["--results", f"fine-tuned:vqa-rad={file}", "--output", str(tmp_path / "t.md")])
    shown = capsys.readouterr().out
    # One standard error: sqrt(.6626 × .3374 / 179) and sqrt(.8088 × .1912 / 272).
    assert "66.26 / 64.00 ± 3.53 (ok)" in shown and "80.88 / 50.00 ± 2.38 (off)" in shown
    assert "1 of 2 cells within tolerance" in shown
    assert "66.26 / 64.00 ± 3.53 (ok)" in (tmp_path / "t.md").read_text()


def test_a_cell_that_is_off_can_fail_the_command(tmp_path):
    file = result(tmp_path / "scores.json", 66.26, 0.0)
    assert paper_table.main(["--results", f"fine-tuned:vqa-rad={file}", "--fail-when-off"]) == 1


def test_other_numbers_of_questions_are_said(tmp_path, capsys):
    file = result(tmp_path / "scores.json", 66.26, None, (10, 0))
    paper_table.main(["--results", f"fine-tuned:vqa-rad={file}"])
    shown = capsys.readouterr().out
    assert "(ok, 10 questions instead of 179)" in shown and "no question" in shown


@pytest.mark.parametrize("text", ["vqa-rad=x", "fine-tuned:other=x", "fine-tuned:vqa-rad"])
def test_results_that_name_no_cell_are_an_error(text):
    with pytest.raises(LlavaError, match="expected ROW:SET=FILE"):
        paper_table.main(["--results", text])


def test_results_that_do_not_fit_the_table_are_an_error(tmp_path):
    file = result(tmp_path / "scores.json", 64.0, 50.0)
    with pytest.raises(LlavaError, match="--results: fine-tuned:vqa-rad stands more than once; give one file for it"):
        paper_table.main(["--results", *[f"fine-tuned:vqa-rad={file}"] * 2])
    scored = json.loads(file.read_text()) | {"settings": {"script": "run_eval_pvqa"}}
    for content, message in (
        (scored, "scored by run_eval_pvqa's rules; the published table is run_eval_batch's"),
        ({"paper": {}}, "not a result of run_eval --output"),
        ({"paper": 1}, "not a result of run_eval --output"),
        ([], "not a result of run_eval --output"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(LlavaError, match=message):
            paper_table.main(["--results", f"fine-tuned:vqa-rad={file}"])


def test_missing_answers_are_said_in_the_table(tmp_path, capsys):
    file = result(tmp_path / "scores.json", 64.0, 50.0)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"missing_answers": 7}))
    paper_table.main(["--results", f"fine-tuned:vqa-rad={file}"])
    assert capsys.readouterr().out.count(", 7 answers of the file missing)") == 2


@pytest.mark.long
def test_from_deltas_to_the_table(tmp_path):
    """The script as written, every step a real process: LLaMA + delta, answers, scores, table."""
    base = make_llm(tmp_path / "llama")
    target = make_llava(tmp_path / "target", conversation_template="v1")
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    flags = ["--base", str(base), "--target", str(target), "--delta", str(deltas / "data_RAD-9epoch_delta")]
    subprocess.run([sys.executable, "-m", "llava.model.make_delta", *flags], check=True, capture_output=True)
    shutil.make_archive(str(deltas / "data_RAD-9epoch_delta"), "zip", deltas, "data_RAD-9epoch_delta")
    shutil.rmtree(deltas / "data_RAD-9epoch_delta")
    data = tmp_path / "data" / "vqa_rad"
    (data / "images").mkdir(parents=True)
    Image.new("RGB", (30, 30), (200, 10, 10)).save(data / "images" / "a.png")
    kinds = [("Is there a fracture?", "yes", "CLOSED"), ("Where?", "lung", "OPEN")]
    records = [
        {
            "id": str(index),
            "image": "a.png",
            "conversations": [{"from": "human", "value": f"{text}\n<image>"}, {"from": "gpt", "value": answer}],
            "answer_type": kind,
        }
        for index, (text, answer, kind) in enumerate(kinds)
    ]
    (data / "test.json").write_text(json.dumps(records))
    environment = os.environ | {
        "LLAMA": str(base),
        "DELTAS": str(deltas),
        "DATA": str(tmp_path / "data"),
        "OUT": str(tmp_path / "out"),
        "SETS": "vqa-rad",
        "ROWS": "fine-tuned",
        "MAX_NEW_TOKENS": "8",
        "PYTHON": sys.executable,
    }
    script = ["sh", str(ROOT / "scripts" / "reproduce_paper.sh"), "--device", "cpu"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out" / "fine-tuned" / "vqa-rad" / "scores.json").read_text())
    assert (scores["open"], scores["closed"]) == (1, 1)
    ours = scores["paper"]["recall"]["value"]
    assert f"66.26 / {ours:.2f} ± 3.53" in done.stdout and "1 question instead of 179" in done.stdout
    assert (tmp_path / "out" / "table.md").is_file()
