"""Parts of the questions answered by processes that know nothing of each other: one whole, joined once."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.eval import model_vqa_med, run_med_datasets_eval_batch
from llava.eval.answers.shards import Shard, shard_of
from llava.model.convert.projector_extract import extract_projector
from tests.eval.test_answers import NUMBER, flags
from tests.eval.test_answers import data as data
from tests.eval.test_answers import finished as finished
from tests.eval.test_answers import model as model
from tests.made_files import made_record, write

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def names(folder) -> list[str]:
    """Files there, but for what a killed process was just writing."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


WHOLE = ["answers.jsonl", "answers.jsonl.manifest.json"]


@pytest.mark.parametrize("command", ["model_vqa_med", "run_med_datasets_eval_batch"])
def test_two_processes_at_once_make_the_whole(command, finished, model, data, tmp_path):
    path = tmp_path / "answers.jsonl"
    words = flags(model, data, path, "--device", "cpu")
    both = [start("-m", f"llava.eval.{command}", *words, "--shard", f"{index}/2") for index in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert path.read_bytes() == finished.read_bytes()
    assert names(tmp_path) == WHOLE
    manifest = json.loads((tmp_path / WHOLE[1]).read_text())
    assert (manifest["processes"], manifest["asked"], manifest["counts"]["questions"]) == (2, NUMBER, NUMBER)
    if command == "model_vqa_med":  # the last one says where the whole is
        assert str(path) in {out.strip() for out, _ in outputs}


def test_a_killed_part_goes_on_and_a_requeued_one_answers_nothing(
    finished,
    model,
    data,
    tmp_path,
    monkeypatch,
):
    path = tmp_path / "answers.jsonl"
    words = flags(model, data, path, "--device", "cpu")
    killed = start("-m", "llava.eval.model_vqa_med", *words, "--shard", "0/2")
    part = Shard(0, 2).path(path)
    begun = part.with_name(part.name + ".part")
    until = time.monotonic() + 90
    while time.monotonic() < until and killed.poll() is None and not (begun.exists() and begun.stat().st_size):
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    assert begun.exists() and not part.exists()
    model_vqa_med.main([*words, "--shard", "1/2"])
    assert not path.exists() and Shard(1, 2).path(path).exists(), "no whole before all parts are there"
    model_vqa_med.main([*words, "--shard", "0/2"])
    assert path.read_bytes() == finished.read_bytes() and names(tmp_path) == WHOLE
    monkeypatch.setattr("llava.eval.answers.local.LocalModel.load", lambda self: pytest.fail("loaded the model"))
    model_vqa_med.main([*words, "--shard", "1/2"])
    assert path.read_bytes() == finished.read_bytes() and names(tmp_path) == WHOLE


def test_parts_of_other_settings_are_not_joined(model, data, tmp_path):
    path = tmp_path / "answers.jsonl"
    model_vqa_med.main(flags(model, data, path, "--shard", "0/2"))
    with pytest.raises(LlavaError, match=r"different runs \(different: decoding\)"):
        model_vqa_med.main(flags(model, data, path, "--shard", "1/2", "--temperature", "0.5"))
    assert not path.exists() and Shard(0, 2).path(path).exists()


def test_processes_of_torchrun_have_their_ranks(finished, model, data, tmp_path):
    path = tmp_path / "answers.jsonl"
    words = flags(model, data, path, "--device", "cpu")
    launched = start("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517",
                     "-m", "llava.eval.model_vqa_med", *words)  # fmt: skip
    _, errors = launched.communicate(timeout=180)
    assert launched.returncode == 0, errors
    assert path.read_bytes() == finished.read_bytes() and names(tmp_path) == WHOLE


def test_parts_are_joined_again_where_the_whole_is_gone_and_its_manifest_is_not(finished, model, data, tmp_path):
    path = tmp_path / "answers.jsonl"
    words = flags(model, data, path, "--device", "cpu")
    for _ in range(2):
        for index in range(2):
            model_vqa_med.main([*words, "--shard", f"{index}/2"])
        assert path.read_bytes() == finished.read_bytes() and names(tmp_path) == WHOLE
        path.unlink()


def test_answering_anew_forgets_the_parts(finished, model, data, tmp_path):
    path = tmp_path / "answers.jsonl"
    model_vqa_med.main(flags(model, data, path, "--shard", "1/2"))
    old = Shard(1, 2).path(path)
    old.write_text(old.read_text().replace("abc", "xyz"))
    words = flags(model, data, path, "--num-chunks", "2", "--device", "cpu")
    run_med_datasets_eval_batch.main([*words, "--overwrite"])
    assert path.read_bytes() == finished.read_bytes() and names(tmp_path) == WHOLE


RANKS = {"RANK": "1", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [(None, {}, None), ("2/3", RANKS, Shard(2, 3)), (None, RANKS, Shard(1, 4)), (None, {"WORLD_SIZE": "1"}, None)],
)
def test_which_part_it_is(given, environment, expected):
    assert shard_of(Namespace(shard=given, overwrite=False), environment) == expected


@pytest.mark.parametrize("given", ["3/3", "1", "-1/3", "a/b", "1/0"])
def test_parts_that_can_not_be(given):
    with pytest.raises(LlavaError, match="give i/n with i from 0"):
        shard_of(Namespace(shard=given, overwrite=False), {})


def test_flags_that_exclude_each_other(model, data, tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(LlavaError, match="--overwrite can't be combined with shards"):
        model_vqa_med.main(flags(model, data, path, "--shard", "0/2", "--overwrite"))
    with pytest.raises(LlavaError, match="exclude each other"):
        model_vqa_med.main(flags(model, data, path, "--shard", "0/2", "--num-chunks", "2"))


def test_parts_of_a_part():
    assert Shard(1, 2).split(3) == [Shard(3, 6), Shard(4, 6), Shard(5, 6)]


def test_an_answer_file_of_no_known_kind_is_refused_before_anything_is_asked(tmp_path):
    from llava.eval.answers.answering import answer_questions
    from llava.eval.answers.questions import Question

    with pytest.raises(LlavaError, match="unknown kind"):
        answer_questions([Question(1, "q")], tmp_path / "answers.txt", {}, lambda *_: pytest.fail("asked"))


def test_killed_before_the_manifest_nothing_is_asked_again(tmp_path, monkeypatch):
    from llava.eval.answers import answering
    from llava.eval.answers.questions import Question

    asked = []

    def fill(questions, output):
        for question in questions:
            if question.id not in output.done:
                asked.append(question.id)
                output.add(answering.answer_record(question, "a", "m", {}))
        return {"model_id": "m"}

    def killed(*_, **__):
        raise KeyboardInterrupt

    questions = [Question(number, "q") for number in range(3)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answering, "write_manifest", killed)
        answering.answer_questions(questions, tmp_path / "a.jsonl", {}, fill)
    answering.answer_questions(questions, tmp_path / "a.jsonl", {}, fill)
    assert asked == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.manifest.json"]


def test_questions_without_a_type_are_said_to_get_no_probability(caplog, monkeypatch):
    from llava.eval.answers import local, yes_no
    from llava.eval.answers.questions import Question

    def stop(*_):
        raise LlavaError("far enough")

    monkeypatch.setattr(yes_no, "check_tokens", stop)
    fill = local.LocalAnswers(local.LocalModel("x"), None, None, yes_no_probabilities=True)
    with pytest.raises(LlavaError), caplog.at_level(logging.WARNING):
        fill([Question(1, "q"), Question(2, "q", answer_type="CLOSED")], None)
    assert "1 of 2 questions say neither OPEN nor CLOSED" in caplog.text


def test_a_dry_run_in_parts_shows_its_prompt(tmp_path, capsys):
    from llava.eval.run_med_datasets_eval_batch import main

    questions = write(tmp_path / "q.json", [made_record("1", None, ("What is it?", "x"))])
    flags = ["--api-model", "m", "--api-key", "k", "--api-base", "http://127.0.0.1:9/v1", "--dry-run"]
    main(["--question-file", questions, "--answers-file", str(tmp_path / "a.jsonl"), "--num-chunks", "2", *flags])
    assert "What is it?" in capsys.readouterr().out


def test_a_base_model_that_was_exchanged_is_another_run(model, data, tmp_path):
    llm = shutil.copytree(model.parent / "llm", tmp_path / "llm")
    extract_projector(model, tmp_path / "projector")
    (projector,) = (tmp_path / "projector").glob("mm_projector.*")
    words = flags(llm, data, tmp_path / "a.jsonl", "--mm-projector", str(projector), "--device", "cpu")
    model_vqa_med.main(words)
    (weights,) = llm.glob("*.safetensors")
    other = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(other, weights, {"format": "pt"})
    with pytest.raises(LlavaError, match=r"is complete and of another run \(different: model_base_digest\)"):
        model_vqa_med.main(words)
