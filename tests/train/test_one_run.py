"""A folder that holds a run is never taken for another one's."""

import json
import os
import shutil

import pytest

from llava.errors import LlavaError
from llava.train.train import train
from tests.train.helpers import flags, losses, make_bases, make_records

SAVED = ("--version", "v1", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model to start from, and records."""
    llm, clip = make_bases(tmp_path_factory.mktemp("bases"))
    data = make_records(tmp_path_factory.mktemp("data"))
    model = tmp_path_factory.mktemp("start") / "model"
    train(flags(model, data, llm, "--vision_tower", str(clip), "--version", "v1", "--max_steps", "1"))
    return model, data


@pytest.fixture
def run(tmp_path, start):
    """A finished run with checkpoints, and how to start one like it."""
    model, data = start
    folder, own = tmp_path / "run", tmp_path / "records.json"
    shutil.copytree(data.parent / "images", tmp_path / "images")
    shutil.copy(data, own)
    train(flags(folder, own, model, *SAVED))
    return folder, own, lambda *more: train(flags(folder, own, model, *SAVED, *more))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_flags_are_refused_by_name_and_nothing_is_touched(run):
    folder, _, again = run
    before = content(folder)
    with pytest.raises(LlavaError, match=r"holds another run: learning_rate was 0.001, is 0.1\. Choose another"):
        again("--learning_rate", "0.1")
    with pytest.raises(LlavaError, match=r"weight_decay was 0\.0, is 0\.5"):
        again("--weight_decay", "0.5")
    assert content(folder) == before


def test_other_data_of_the_same_name_are_refused(run):
    _, data, again = run
    records = json.loads(data.read_text())
    data.write_text(json.dumps(records[:-1]))
    with pytest.raises(LlavaError, match=r"data_path was records.json, [\d,]+ bytes, checksum \d+, is records.json"):
        again()


def test_a_finished_run_that_ended_within_an_epoch_trains_no_further(run):
    folder, _, again = run
    before = content(folder)
    summary = again()
    assert summary["steps"] == 4 and summary["samples_seen"] and summary["resumed_from"]
    assert content(folder) == before


def test_flags_that_change_nothing_that_is_learned_may_differ(run):
    _, _, again = run
    assert again("--logging_steps", "2", "--dataloader_num_workers", "0", "--save_total_limit", "3")["resumed_from"]


def test_one_goes_on_with_other_flags_if_asked_to(run):
    folder, _, again = run
    summary = again("--max_steps", "6", "--resume_from_checkpoint")
    assert summary["resumed_from"].endswith("checkpoint-4") and summary["steps"] == 6
    first = folder / "checkpoint-2"
    assert again("--max_steps", "7", "--resume_from_checkpoint", str(first))["resumed_from"] == str(first)
    with pytest.raises(LlavaError, match="checkpoint-9: there is no such folder"):
        again("--resume_from_checkpoint", str(folder / "checkpoint-9"))


def test_one_starts_anew_if_asked_to(run):
    folder, _, again = run
    before = losses(folder)
    summary = again("--learning_rate", "0.1", "--overwrite_output_dir")
    assert summary["resumed_from"] is None and len(losses(folder)) == len(before) and losses(folder) != before
    assert again("--learning_rate", "0.1")["resumed_from"]  # the folder is the new run's now


def test_a_folder_without_work_in_it_is_free(run, start, tmp_path):
    folder, data, _ = run
    (tmp_path / "new").mkdir()
    shutil.copy(folder / "training_flags.json", tmp_path / "new")
    train(flags(tmp_path / "new", data, start[0], *SAVED, "--learning_rate", "0.1"))


def test_a_model_of_unknown_flags_is_kept_apart_in_words(run, caplog):
    folder, _, again = run
    os.remove(folder / "training_flags.json")
    again("--learning_rate", "0.1")
    assert "holds a model, and doesn't say with which flags" in caplog.text
