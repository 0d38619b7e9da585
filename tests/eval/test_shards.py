"""Parts of the questions answered by processes that know nothing of each other: one whole, joined once."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace

import pytest

from llava.errors import LlavaError
from llava.eval import model_vqa_med, run_med_datasets_eval_batch
from llava.eval.answers.shards import Shard, shard_of
from tests.eval.test_answers import NUMBER, flags
from tests.eval.test_answers import data as data
from tests.eval.test_answers import finished as finished
from tests.eval.test_answers import model as model

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
