"""G8: twenty optimizer steps give the reference's losses, gradient norms, learning rates and final weights."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from llava.train import setup_run
from llava.train.arguments import parse_arguments
from llava.train.data.record_store import open_records
from llava.train.prepare_model import prepare_model
from llava.train.setup_run import build_dataset, build_trainer
from llava.train.trainer import LlavaTrainer
from tests.conftest import golden_cases

# From the case's meta.json ("tolerance"): relative, by step.
EARLY, EARLY_STEPS, LATE, GRAD_NORM, UPDATE = 1e-4, 5, 1e-3, 1e-3, 1e-3


class Replay(Dataset):
    """Samples in a recorded order."""

    def __init__(self, dataset, ids):
        place = {dataset.store[index]["id"]: index for index in range(len(dataset))}
        self.dataset, self.order = dataset, [place[name] for name in ids]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        return self.dataset[self.order[index]]


class Recorder(LlavaTrainer):
    """Keeps each micro-batch's loss."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.__dict__.setdefault("micro_losses", []).append(loss.item())
        return loss


def run_case(case, output_dir, monkeypatch):
    monkeypatch.chdir(case.parent)
    monkeypatch.setattr(setup_run, "LlavaTrainer", Recorder)
    meta = json.loads((case / "meta.json").read_text())
    steps = json.loads((case / "steps.json").read_text())
    argv = list(meta["argv"])
    argv[argv.index("--output_dir") + 1] = str(output_dir)
    arguments = parse_arguments(argv)
    # The order is replayed, so nothing is grouped here.
    arguments.training.group_by_modality_length = False
    arguments.training.train_sampling_strategy = "sequential"
    loaded = prepare_model(arguments)
    start = dict(np.load(case / "init_projector.npz"))
    state = loaded.model.state_dict()
    if arguments.model.pretrain_mm_mlp_adapter:
        for name, value in start.items():
            np.testing.assert_array_equal(state[name].numpy(), value)
    else:
        loaded.model.load_state_dict({name: torch.from_numpy(value) for name, value in start.items()}, strict=False)
    dataset, cache = build_dataset(arguments, loaded, open_records(arguments.data.data_path))
    trainer = build_trainer(arguments, loaded, dataset, cache)
    trainer.train_dataset = Replay(dataset, [name for step in steps for batch in step["ids"] for name in batch])
    trainer.train()
    return trainer, steps, start


@pytest.mark.parametrize("case", golden_cases("G8_training"))
def test_twenty_steps_match_the_reference(case, tmp_path, monkeypatch):
    trainer, steps, start = run_case(case, tmp_path, monkeypatch)
    micro_losses = iter(trainer.micro_losses)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(steps) > 0
    for number, (step, log) in enumerate(zip(steps, logs)):
        tolerance = EARLY if number < EARLY_STEPS else LATE
        for wanted in step["micro_losses"]:
            assert next(micro_losses) == pytest.approx(wanted, rel=tolerance), f"step {number + 1}"
        assert log["loss"] == pytest.approx(step["loss"], rel=tolerance), f"step {number + 1}"
        assert log["grad_norm"] == pytest.approx(step["grad_norm"], rel=GRAD_NORM), f"step {number + 1}"
        assert log["learning_rate"] == pytest.approx(step["lr_applied"], rel=1e-6, abs=1e-12)
    final = trainer.model.state_dict()
    for name, wanted in np.load(case / "final_projector.npz").items():
        update = np.linalg.norm(wanted - start[name])
        assert np.linalg.norm(final[name].numpy() - wanted) <= UPDATE * update, name
    check_other_weights(case, final)


def check_other_weights(case, final):
    """Every weight's sum and norm, and the small ones in full where they were recorded."""
    for name, wanted in json.loads((case / "final_stats.json").read_text()).items():
        if name in final:
            value = final[name].double()
            assert list(value.shape) == wanted["shape"]
            assert value.norm().item() == pytest.approx(wanted["l2"], rel=1e-4), name
    small = case / "final_small.npz"
    if small.is_file():
        for name, wanted in np.load(small).items():
            np.testing.assert_allclose(final[name].numpy(), wanted, rtol=0, atol=1e-3 * np.abs(wanted).max() + 1e-7)


@pytest.mark.parametrize("case", golden_cases("G8_training"))
def test_parameter_groups_match_the_reference(case, tmp_path, monkeypatch):
    monkeypatch.chdir(case.parent)
    meta = json.loads((case / "meta.json").read_text())
    argv = list(meta["argv"])
    argv[argv.index("--output_dir") + 1] = str(tmp_path)
    arguments = parse_arguments(argv)
    loaded = prepare_model(arguments)
    dataset, cache = build_dataset(arguments, loaded, open_records(arguments.data.data_path))
    trainer = build_trainer(arguments, loaded, dataset, cache)
    found = [
        (
            sum(p.numel() for p in group["params"]),
            group["weight_decay"],
            group.get("lr", arguments.training.learning_rate),
        )
        for group in trainer.parameter_groups(trainer.model)
    ]
    wanted = [
        (group["n_params"], group["weight_decay"], group["initial_lr"])
        for group in meta["optimizer_groups"]
        if group["n_params"]
    ]
    assert sorted(found) == sorted(wanted)
