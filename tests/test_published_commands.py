"""What the published READMEs' readers type, as it stands there: from the repository's root, without further flags."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llava.errors import LlavaError
from llava.eval import run_eval_batch
from llava.eval.summarize_gpt_review import newest_scores
from llava.manifests import write_manifest
from llava.openai_api import settings_from_args
from llava.train.derived_flags import _set_wandb
from tests.documented_commands import ROOT


@pytest.mark.parametrize("name", ["model_vqa.py", "summarize_gpt_review.py"])
@pytest.mark.parametrize("folder", [ROOT, ROOT / "llava" / "eval"], ids=["root", "llava/eval"])
def test_files_that_are_called_by_name(name, folder):
    done = subprocess.run([sys.executable, name, "--help"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def judged(path, scores=(8, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"judgement": "1", "question_id": 1, "type": "conversation", "domain": {"mri": True}, "scores": scores}
    path.write_text(json.dumps({**row, "question": "q", "answer": "a", "model_id": "m", "gpt_eval": "8 4"}) + "\n")


def test_the_newest_scores_are_summed_up_and_named(tmp_path):
    judged(tmp_path / "old.jsonl", (1, 1))
    judged(tmp_path / "runs" / "new.jsonl")
    os.utime(tmp_path / "old.jsonl", (1, 1))
    (tmp_path / "answers.jsonl").write_text('{"question_id": 1, "text": "no judge was here"}\n')
    assert newest_scores(tmp_path) == tmp_path / "runs" / "new.jsonl"
    script = ROOT / "summarize_gpt_review.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "new.jsonl, the newest of 2; --scores-file names another" in done.stderr and "50.0" in done.stdout


def test_without_scores_it_says_what_to_give(tmp_path):
    with pytest.raises(LlavaError, match=r"no file of judged answers below .*; give --scores-file"):
        newest_scores(tmp_path)


def test_answer_files_are_scored_against_the_questions_of_their_manifests(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, answer in (("vqa_rad", "yes"), ("pvqa", "no")):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        turns = [{"from": "human", "value": "Is it?\n<image>"}, {"from": "gpt", "value": answer}]
        question = {"id": 1, "image": "a.png", "conversations": turns, "answer_type": "CLOSED"}
        (folder / "test.json").write_text(json.dumps([question]))
        answers = tmp_path / "runs" / name / "test-answer-file.jsonl"
        answers.parent.mkdir(parents=True)
        answers.write_text('{"question_id": 1, "text": "yes"}\n')
        write_manifest(answers, questions=str(folder / "test.json"))
    run_eval_batch.main(["--pred_file_parent_path", "runs", "--target_test_type", "test-answer-file"])
    rows = [json.loads(line) for line in (tmp_path / "eval_results_med_datasets.jsonl").read_text().splitlines()]
    assert [(row["dataset"], row["strict"]["closed accuracy"]["value"]) for row in rows] == [
        ("pvqa", 0.0),
        ("vqa_rad", 100.0),
    ]


class Flags:
    """API flags as parsed from a command line without any."""

    def __getattr__(self, name):
        return 1 if name == "concurrency" else None


@pytest.mark.parametrize(
    ("environment", "model"),
    [
        ({"OPENAI_API_KEY": "k"}, "gpt-4-0314"),
        (
            {"AZURE_OPENAI_ENDPOINT": "https://e", "AZURE_OPENAI_API_KEY": "k", "OPENAI_API_VERSION": "v"},
            "deployment-name",
        ),
    ],
)
def test_a_model_that_is_not_named_is_the_published_one_and_said(caplog, environment, model):
    assert settings_from_args(Flags(), environment).model == model
    assert f"no model named: asking for '{model}', as published" in caplog.text


def test_without_a_login_and_a_terminal_wandb_stays_offline(monkeypatch, tmp_path, caplog):
    pytest.importorskip("wandb", reason="wandb isn't installed (extra tracking)")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    training = SimpleNamespace(report_to=["wandb"])
    _set_wandb(training)
    assert os.environ["WANDB_MODE"] == "offline"
    assert "there is no login: the run stays in wandb/" in caplog.text
    import wandb

    wandb.init(project="x", dir=tmp_path).finish()
    assert list(tmp_path.glob("wandb/offline-run-*")), "it starts so, though it was asked for a login before"
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    _set_wandb(training)
    assert "WANDB_MODE" not in os.environ
