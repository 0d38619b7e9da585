"""Held-out records in the loop: their loss, the best checkpoint, early stopping, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.modules.module import _IncompatibleKeys

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.train import setup_run
from llava.train.arguments import parse_arguments
from llava.train.data.record_store import open_records
from llava.train.prepare_model import prepare_model
from llava.train.train import train
from llava.train.trainer import LlavaTrainer
from llava.train.validation.held_out import even_batches
from tests.train.helpers import flags, losses, make_records
from tests.train.test_distributed import FSDP, FSDP_ON_CPU, ROOT, TRAIN, launch, needs_deepspeed, zero
from tests.train.test_step import Waits

RUN = ("--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "2", "--per_device_eval_batch_size", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training records, and held-out ones beside them (13, every third without an image).

    Those in other.json have answers that training makes unlikely: their loss rises.
    """
    folder = tmp_path_factory.mktemp("data")
    held = make_records(folder, 13, text_only_every=3, name="held_out.json")
    records = json.loads(held.read_text())
    for record in records:
        record["conversations"][1]["value"] = "Nowhere was any pneumothorax seen"
    (folder / "other.json").write_text(json.dumps(records))
    return make_records(folder, 24, text_only_every=3)


def held_out(data: Path, name: str = "held_out.json") -> tuple[str, str]:
    return "--eval_data_path", str(data.with_name(name))


def curve(folder: Path, name: str = "eval_loss") -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def loss_by_hand(model_folder: Path, argv: list[str]) -> tuple[float, int]:
    """Mean over all held-out targets, record by record, from whole float32 logits of the finished model."""
    arguments = parse_arguments([word for word in argv if word != "--cache_vision_features"])
    loaded = prepare_model(arguments)
    dataset, _ = setup_run.build_dataset(
        arguments.held_out(), loaded, open_records(arguments.validation.eval_data_path)
    )
    model = load_pretrained_model(model_folder, device="cpu", dtype=torch.float32).model.eval()
    total, count = 0.0, 0
    for item in dataset:
        ids = torch.from_numpy(item["sample"].input_ids).long()[None]
        labels = torch.from_numpy(item["sample"].labels).long()[None]
        pixels = torch.from_numpy(item["pixel_values"]) if "pixel_values" in item else None
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    return total / count, count


@pytest.mark.parametrize(
    "more",
    [(), ("--packing",), ("--packing", "--max_tokens_per_batch", "150"), ("--cache_vision_features",)],
    ids=["padded", "packed", "filled", "cached"],
)
def test_the_held_out_loss_is_the_mean_over_all_targets_and_changes_nothing(tmp_path, base, data, more):
    words = flags(tmp_path / "with", data, base, *RUN, *held_out(data), *more)
    summary = train(words)
    found = curve(tmp_path / "with")
    wanted, count = loss_by_hand(tmp_path / "with", words)
    assert len(found) == 3 and found[-1] == pytest.approx(wanted, rel=1e-5)
    measured = summary["validation"]
    for kind in ("truncated", "without_target", "answers_without_question", "left_out"):
        assert measured[kind] == {"count": 0, "first": []}, kind
    assert measured["samples"] == 13 and measured["curve"][-1]["target_tokens"] == count
    assert measured["last_loss"] == found[-1] and measured["lowest_loss"] == min(found)
    train(flags(tmp_path / "without", data, base, "--max_steps", "6", *more))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


@pytest.mark.parametrize("more", [(), ("--packing",)], ids=["padded", "packed"])
def test_no_held_out_batch_waits_for_the_gpu(tmp_path, base, data, monkeypatch, more):
    found = []
    choose = LlavaTrainer.model_for_validation

    def watched(self):
        model = choose(self)

        def forward(**batch):
            with Waits() as waits:
                output = model(**batch)
            found.append(waits.found)
            return output

        return forward

    monkeypatch.setattr(LlavaTrainer, "model_for_validation", watched)
    train(flags(tmp_path, data, base, "--max_steps", "1", *RUN[2:4], "--eval_steps", "1", *held_out(data), *more))
    assert len(found) == 2 and not any(found)


@pytest.mark.parametrize(
    ("script", "more"),
    [
        pytest.param(TRAIN, (), id="ddp"),
        pytest.param(FSDP_ON_CPU, FSDP, id="fsdp2"),
        pytest.param(TRAIN, zero(3), id="zero3", marks=needs_deepspeed),
    ],
)
def test_two_processes_measure_the_same_and_load_the_best(tmp_path, base, data, script, more):
    """13 records in batches of 1 on two processes: one process has one less, and some hold text alone."""
    more = (*RUN, *held_out(data, "other.json"), "--per_device_eval_batch_size", "1", "--learning_rate", "3e-2", *more)
    more += ("--load_best_model_at_end", "True", "--save_strategy", "steps", "--save_steps", "2")
    more += ("--save_total_limit", "1")
    words = flags(tmp_path, data, base, *more)
    launch(2, script, *words)
    found = curve(tmp_path)
    best = 2 * (1 + found.index(min(found)))
    assert best < 6, "the rate is chosen so that the last model isn't the best"
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_global_step"] == best and Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    wanted, _ = loss_by_hand(tmp_path, flags(tmp_path, data, base, *RUN, *held_out(data, "other.json")))
    assert min(found) == pytest.approx(wanted, rel=1e-4)


def start(argv: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "llava.train.train", *argv]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def test_killed_in_the_middle_of_an_evaluation_it_resumes_on_the_same_curves(tmp_path, base, data):
    more = (*RUN, *held_out(data), "--per_device_eval_batch_size", "1", "--save_strategy", "steps", "--save_steps", "2")
    with start(flags(tmp_path / "killed", data, base, *more)) as process:
        for line in process.stderr:
            if "step 4: evaluating 13 held-out records" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    assert names == {"checkpoint-2"}, "it was killed after the evaluation"
    for name in ("whole", "killed"):
        process = start(flags(tmp_path / name, data, base, *more))
        assert process.communicate(timeout=300)[1] is not None and process.returncode == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


EARLY = ("--learning_rate", "3e-2", "--max_steps", "9", "--eval_steps", "1", "--early_stopping_patience", "2")


@pytest.mark.parametrize("before_the_end", [1, 0])
def test_a_run_ends_early_and_a_resumed_one_counts_on(tmp_path, base, data, before_the_end):
    more = (*RUN, *held_out(data, "other.json"), *EARLY, "--save_strategy", "steps", "--save_steps", "1")
    train(flags(tmp_path / "whole", data, base, *more))
    found = curve(tmp_path / "whole")
    assert len(found) == 1 + found.index(min(found)) + 2 < 9
    last = len(found) - before_the_end
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{last}", tmp_path / "killed" / f"checkpoint-{last}")
    train(flags(tmp_path / "killed", data, base, *more))
    assert curve(tmp_path / "killed") == found


def test_a_checkpoint_at_the_end_of_an_epoch_holds_its_evaluation(tmp_path, base, data):
    more = (
        "--num_train_epochs",
        "2",
        "--per_device_train_batch_size",
        "6",
        "--eval_strategy",
        "epoch",
        *held_out(data),
    )
    train(flags(tmp_path, data, base, *more, "--save_strategy", "steps", "--save_steps", "2"))
    for step, evaluations in ((2, 0), (4, 1), (6, 1), (8, 2)):
        assert len(curve(tmp_path / f"checkpoint-{step}")) == evaluations, step


def test_the_best_adapter_is_loaded_with_its_projector(tmp_path, base, data):
    """The highest loss is asked for, which is the first."""
    more = (*RUN, *held_out(data), "--lora_enable", "True", "--learning_rate", "1e-2", "--greater_is_better", "True")
    more += ("--load_best_model_at_end", "True", "--save_strategy", "best")
    summary = train(flags(tmp_path, data, base, *more))
    best = tmp_path / f"checkpoint-{summary['validation']['best_step']}"
    assert summary["validation"]["best_was_loaded"] and summary["validation"]["best_step"] == 2
    name = "non_lora_trainables.bin"
    kept, final = (torch.load(folder / name, weights_only=True) for folder in (best, tmp_path))
    assert kept and all(torch.equal(kept[key], final[key]) for key in kept)
    kept, final = (load_file(folder / "adapter_model.safetensors") for folder in (best, tmp_path))
    assert all(torch.equal(kept[key], final[key]) for key in kept)


def test_loading_the_best_tells_only_what_is_wrong(tmp_path, base, data, monkeypatch):
    """A checkpoint has the tower's last layers, which the model doesn't hold."""
    said, trainers = [], []
    load = LlavaTrainer._load_best_model
    monkeypatch.setattr(transformers.trainer.logger, "warning", said.append)
    monkeypatch.setattr(LlavaTrainer, "_load_best_model", lambda self: (trainers.append(self), load(self)))
    more = (*RUN, *held_out(data), "--save_strategy", "best", "--load_best_model_at_end", "True")
    assert train(flags(tmp_path, data, base, *more))["validation"]["best_was_loaded"]
    assert not [text for text in said if "keys" in text]
    held = set(trainers[0].model.state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) - held, "nothing is there that could be told"
    trainers[0]._issue_warnings_after_load(_IncompatibleKeys(["model.norm.weight"], ["model.another"]))
    assert len([text for text in said if "model.norm.weight" in text or "model.another" in text]) == 2


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_process_has_as_many_batches(processes):
    batches = even_batches([5, 9, 1, 7, 7, 3, 2], 2, processes)
    assert len(batches) % processes == 0
    assert sorted(number for batch in batches for number in batch) == list(range(7)) and batches[0] == [1, 3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval_strategy", "steps"), "--eval_strategy steps needs held-out records; add --eval_data_path"),
        (("--early_stopping_patience", "2"), "--early_stopping_patience needs held-out records"),
        (("--eval_generate", "4"), "--eval_generate needs held-out records"),
        (
            ("--eval_data_path", "HELD"),
            "--eval_data_path: say when it is measured, with --eval_strategy epoch or steps",
        ),
        (("--eval_data_path", "missing.json"), "--eval_data_path missing.json: no such file"),
        (
            ("--eval_data_path", "HELD", "--eval_strategy", "epoch", "--metric_for_best_model", "accuracy"),
            "--metric_for_best_model accuracy: expected loss; with --eval_generate also strict_open, strict_closed",
        ),
        (
            ("--eval_data_path", "HELD", "--eval_strategy", "epoch", "--early_stopping_patience", "0"),
            "--early_stopping_patience 0: expected at least 1",
        ),
    ],
)
def test_what_cant_be_is_refused_before_the_model_is_loaded(tmp_path, data, more, message):
    more = [held_out(data)[1] if word == "HELD" else word for word in more]
    with pytest.raises(LlavaError, match=message):
        parse_arguments(flags(tmp_path, data, data.parent, *more))


def test_a_held_out_image_that_is_missing_is_named_before_training(tmp_path, base, data):
    make_records(tmp_path, 4, name="held_out.json")
    (tmp_path / "images" / "green.png").unlink()
    more = (*RUN, "--eval_data_path", str(tmp_path / "held_out.json"), "--eval_image_folder", str(tmp_path / "images"))
    with pytest.raises(LlavaError, match=r'held_out\.json record 1 \("r1"\): image ".*green\.png" not found'):
        train(flags(tmp_path / "out", data, base, *more))
