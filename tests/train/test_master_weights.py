"""Weights in bfloat16 alone, with 8-bit moments and rounding at random; bitsandbytes' optimizers on the same path."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.train import setup_run
from llava.train.arguments import parse_arguments
from llava.train.data.record_store import open_records
from llava.train.prepare_model import prepare_model
from llava.train.train import train
from tests.tiny import make_llava
from tests.train.helpers import flags, losses, make_records
from tests.train.test_distributed import FSDP, FSDP_ON_CPU, launch

RUN = ("--max_steps", "20", "--lr_scheduler_type", "constant")
BF16_ALONE = ("--bf16", "True", "--optim", "adamw_torch_8bit", "--master_weights", "False")
TOLERANCE = 4e-2
"""Of losses around 5, over 20 steps at 1e-3 (measured: 1.2e-2, sharded 2.3e-2)."""
ACCUMULATED = ("--gradient_accumulation_steps", "2")


@pytest.fixture(autouse=True)
def not_compiled():
    """torchao compiles its step for each shape, which takes longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data"), 24, text_only_every=3)


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory, base, data):
    folder = tmp_path_factory.mktemp("float32")
    train(flags(folder, data, base, *RUN, *ACCUMULATED))
    return losses(folder)


def make_trainer(argv):
    arguments = parse_arguments(argv)
    loaded = prepare_model(arguments)
    dataset, cache = setup_run.build_dataset(arguments, loaded, open_records(arguments.data.data_path))
    return setup_run.build_trainer(arguments, loaded, dataset, cache)


def test_losses_follow_those_of_float32(tmp_path, base, data, in_float32, caplog):
    with caplog.at_level("INFO"):
        train(flags(tmp_path, data, base, *RUN, *ACCUMULATED, *BF16_ALONE))
    assert losses(tmp_path) == pytest.approx(in_float32, abs=TOLERANCE)
    assert "summed over micro-batches in bfloat16 too" in caplog.text
    saved, before = (load_file(folder / "model.safetensors") for folder in (tmp_path, base))
    assert all(saved[name].dtype == torch.bfloat16 for name in saved if "vision_tower" not in name)
    assert saved.keys() == before.keys()
    load_pretrained_model(tmp_path, device="cpu")


def test_nothing_is_cast_by_autocast(tmp_path, base, data, monkeypatch):
    trainer = make_trainer(flags(tmp_path, data, base, "--max_steps", "1", *BF16_ALONE))
    seen = set()
    for layer in trainer.model.model.layers:
        layer.register_forward_hook(
            lambda module, args, output: seen.add((args[0].dtype, output.dtype, torch.is_autocast_enabled("cpu")))
        )
    trainer.train()
    assert seen == {(torch.bfloat16, torch.bfloat16, False)}


@pytest.mark.parametrize("at_random", [True, False])
def test_changes_below_the_rounding_of_bfloat16_add_up(tmp_path, base, data, at_random):
    """Adam's step is the learning rate, 40 times less than the distance from 1 to the next number."""
    trainer = make_trainer(flags(tmp_path, data, base, "--learning_rate", "1e-4", "--weight_decay", "0", *BF16_ALONE))
    optimizer = trainer.create_optimizer()
    if not at_random:
        optimizer.bf16_stochastic_round = False
    weight = trainer.model.lm_head.weight
    weight.data.fill_(1.0)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    if at_random:
        assert 1 - weight.float().mean().item() == pytest.approx(50e-4, rel=0.1)
    else:
        assert weight.eq(1).all()


def test_a_parameter_takes_six_bytes(tmp_path, base, data, monkeypatch):
    trainer = make_trainer(flags(tmp_path, data, base, "--max_steps", "1", *BF16_ALONE))
    taken = {}

    def measure(self, model):
        taken["gradients"] = {name: size_of([parameter.grad]) for name, parameter in model.named_parameters()
                              if parameter.grad is not None}  # fmt: skip
        return type(self)._clip_grad_norm(self, model)

    monkeypatch.setattr(trainer, "_clip_grad_norm", measure.__get__(trainer))
    trainer.train()
    state = trainer.optimizer.optimizer.state
    large = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad and one.numel() >= 4096}
    numbers = sum(one.numel() for one in large.values())
    assert size_of(large.values()) == 2 * numbers == sum(taken["gradients"][name] for name in large)
    # A byte for each moment, a scale for 256, and the levels that the bytes stand for.
    levels = 2 * 256 * 4 * len(large)
    moments = size_of(one for parameter in large.values() for key, one in state[parameter].items() if key != "step")
    assert moments == pytest.approx(2 * numbers * (1 + 4 / 256) + levels)


def size_of(tensors) -> int:
    total = 0
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            total += size_of(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            total += tensor.untyped_storage().nbytes()
    return total


def resumed(start, tmp_path, *more):
    """(folder of a run of 6 steps, folder of one killed after 3 and resumed), by `start(folder, *flags)`."""
    more = (*more, *RUN, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3")
    start(tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "killed" / "checkpoint-3")
    start(tmp_path / "killed", *more)
    return tmp_path / "whole", tmp_path / "killed"


def assert_equal(whole, killed) -> None:
    assert losses(killed) == losses(whole) and len(losses(whole)) == 6
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("more", [BF16_ALONE, ("--optim", "adamw_torch_8bit"), ("--optim", "adamw_bnb_8bit")])
def test_a_resumed_run_is_bit_equal(tmp_path, base, data, more):
    assert_equal(*resumed(lambda folder, *given: train(flags(folder, data, base, *given)), tmp_path, *more))


def test_sharded_over_two_processes(tmp_path, base, data, in_float32):
    """Reduced over processes in float32, then rounded; each process rounds its own part at random."""
    done = launch(2, FSDP_ON_CPU, *flags(tmp_path / "out", data, base, *RUN, *FSDP, *BF16_ALONE))
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen["sharded"] == seen["parameters"] and seen["gradient_dtypes"] == ["torch.bfloat16"]
    assert losses(tmp_path / "out") == pytest.approx(in_float32, abs=TOLERANCE)


@pytest.mark.long
def test_a_sharded_run_resumes_bit_equal(tmp_path, base, data):
    """Each process saves its own part of the moments."""

    def start(folder, *given):
        launch(2, FSDP_ON_CPU, *flags(folder, data, base, *given))

    assert_equal(*resumed(start, tmp_path, *FSDP, *BF16_ALONE))


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adamw_torch_8bit", "adamw_bnb_8bit", "paged_lion_8bit", "adafactor"])
def test_optimizers_with_small_moments_compute_as_all_others(tmp_path, base, data, in_float32, optimizer):
    """A group of one: no autocast, float32 masters and sums; it resumes on what it saved."""
    seen = {}

    def start(folder, *given):
        done = launch(1, FSDP_ON_CPU, *flags(folder, data, base, *given))
        seen.update(json.loads(done.stdout.strip().splitlines()[-1]))

    more = (*FSDP, *ACCUMULATED, "--bf16", "True", "--optim", optimizer)
    whole, killed = resumed(start, tmp_path, *more)
    assert seen["sharded"] == seen["parameters"] and seen["gradient_dtypes"] == ["torch.float32"]
    assert_equal(whole, killed)
    if optimizer.startswith("adamw"):
        assert losses(whole) == pytest.approx(in_float32[:6], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--optim", "adamw_torch"), "add --optim adamw_torch_8bit, which rounds at random"),
        (("--bf16", "False"), "add --bf16 True"),
        (("--lora_enable", "True"), "with --lora_enable, --tune_mm_mlp_adapter or --freeze_backbone leave it out"),
        (("--tune_mm_mlp_adapter", "True"), "leave it out"),
    ],
)
def test_what_weights_in_bfloat16_alone_are_refused_with(tmp_path, base, data, changed, message):
    with pytest.raises(LlavaError, match=message):
        parse_arguments(flags(tmp_path, data, base, *BF16_ALONE, *changed))


def test_a_missing_torchao_is_said_before_anything_is_loaded(tmp_path, base, data, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(LlavaError, match=r"pip install \"llava-med\[torchao\]\""):
        parse_arguments(flags(tmp_path, data, base, "--optim", "adamw_torch_8bit"))


@pytest.mark.long
def test_the_compiled_step_trains_too(tmp_path, base, data, in_float32):
    with torch.compiler.set_stance("default"):
        train(flags(tmp_path, data, base, *RUN, "--max_steps", "3", *ACCUMULATED, *BF16_ALONE))
    assert losses(tmp_path) == pytest.approx(in_float32[:3], abs=TOLERANCE)
