"""Steps run once for their settings, and a failed command says why."""

import shutil
import sys
from pathlib import Path

import pytest

from llava.demo import steps
from llava.demo.__main__ import main, what_comes_next
from llava.demo.pipeline import Job, Pipeline
from llava.demo.report import _in_words
from llava.demo.settings import SMALL
from llava.errors import LlavaError
from llava.records import write_json


def _job(folder, name: str, code: str) -> Job:
    return Job(name, ["-c", code], [folder / f"{name}.txt"])


def _append(path) -> str:
    return f"open({str(path)!r}, 'a').write('x')"


def test_a_demo_of_another_size_or_seed_is_not_mixed_into_the_one_that_is_there(tmp_path):
    """As after `--small`, to try the installation, and then the whole one."""
    write_json(tmp_path / "demo.json", {"seed": 3, "small": True})
    for flags in ([], ["--small"]):
        with pytest.raises(LlavaError, match="holds the small demo of seed 3; name another folder"):
            main(["--output-dir", str(tmp_path), *flags])
    assert [file.name for file in tmp_path.iterdir()] == ["demo.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """A run of one's own called `vqa` would be removed for the demo's."""
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa" / "config.json").write_text("mine")
    with pytest.raises(LlavaError, match="the folder isn't empty; give another one, or --overwrite"):
        main(["--output-dir", str(tmp_path), "--small"])
    assert [file.name for file in tmp_path.iterdir()] == ["vqa"]
    assert (tmp_path / "vqa" / "config.json").read_text() == "mine"


def test_finished_steps_are_not_run_again_and_changed_settings_run_all_that_follows(tmp_path):
    calls = []

    def go(setting):
        pipeline = Pipeline(tmp_path, 0, 2)
        pipeline.call("first", "first", lambda: calls.append("first"), setting)
        pipeline.run("second", [Job("second", ["-c", _append(tmp_path / "log")], [])])
        return pipeline

    go(1)
    again = go(1)
    assert calls == ["first"] and (tmp_path / "log").read_text() == "x"
    assert set(again.seconds) == {"first", "second"} and again.total == pytest.approx(sum(again.seconds.values()))
    go(2)
    assert calls == ["first", "first"] and (tmp_path / "log").read_text() == "xx"


def test_each_step_that_runs_has_a_number_of_its_own(tmp_path, monkeypatch, capsys):
    def finish(pipeline, waiting):
        for job, key in waiting:
            pipeline._finish(job.name, key, 0.0)

    monkeypatch.setattr(Pipeline, "_run", finish)
    for name in ("make_data", "learn_tokenizer", "answer_by_nearest"):
        monkeypatch.setattr(steps, name, lambda *_: None)
    for ending in ("", ": done before"):
        pipeline = steps.run_steps(tmp_path, SMALL, 0)
        said = [line for line in capsys.readouterr().err.splitlines() if line.endswith(ending)]
        count = len(said)
        assert [line.split()[0] for line in said] == [f"{number}/{count}" for number in range(1, count + 1)]
        assert pipeline.number == count == 9 and "3/9 language model" in said[2] and "7/9 VQA fine-tuning" in said[6]


def test_what_a_killed_run_left_is_removed_first(tmp_path):
    (tmp_path / "a.txt").write_text("half")
    Pipeline(tmp_path, 0, 1).run("a", [_job(tmp_path, "a", _append(tmp_path / "a.txt"))])
    assert (tmp_path / "a.txt").read_text() == "x"


def test_a_failed_command_is_one_line_with_its_last_words_and_stops_its_neighbour(tmp_path):
    jobs = [
        _job(tmp_path, "good", "import time; time.sleep(60)"),
        _job(tmp_path, "bad", "import sys; print('no such thing'); sys.exit(3)"),
    ]
    with pytest.raises(LlavaError, match=r"bad failed with exit code 3: no such thing \(log: .*bad.log"):
        Pipeline(tmp_path, 0, 1).run("both", jobs)
    assert not (tmp_path / "done" / "good.json").exists() and not (tmp_path / "done" / "bad.json").exists()


def test_commands_get_their_threads_and_this_python(tmp_path):
    code = (
        f"import os, sys; open({str(tmp_path / 'a.txt')!r}, 'w').write(os.environ['OMP_NUM_THREADS'] + sys.executable)"
    )
    Pipeline(tmp_path, 0, 1).run("a", [Job("a", ["-c", code], [], threads=3)])
    assert (tmp_path / "a.txt").read_text() == f"3{sys.executable}"


def test_the_demo_ends_with_what_comes_next(tmp_path, monkeypatch):
    """With the environment first, where its commands aren't found by name."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    (tmp_path / "Makefile").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    following, first = what_comes_next(Path("runs/demo"))
    assert "make serve" in following and "make chat" in following and first.endswith(": . .venv/bin/activate")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (following,) = what_comes_next(Path("runs/own"))
    assert "llava-med serve --model-path runs/own/vqa" in following


def test_families_are_named_in_words():
    assert [_in_words(name) for name in ("kind_yes_no", "kind_choice", "normality")] == [
        "kind (yes/no)",
        "kind (choice)",
        "normality",
    ]
