"""FSDP 2 over one process: the same losses with float32 gradients, and none of the copies it makes for others."""

import json
from argparse import Namespace
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"

from llava.train.lora import NON_LORA
from llava.train.step.group_of_one import (
    SHARE_FOR_WEIGHTS,
    KeptCopies,
    free_for_copies,
    frozen_as_computed,
    is_group_of_one,
)
from tests.tiny import make_llava
from tests.train.helpers import flags, losses, make_records
from tests.train.test_distributed import FSDP, FSDP_ON_CPU, launch
from tests.train.test_master_weights import RUN, resumed

MICRO_BATCHES = 3
STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(name, *flags)`: (losses, what fsdp_on_cpu has seen) of a run over one process."""
    folder = tmp_path_factory.mktemp("group")
    base, data = make_llava(folder / "base"), make_records(folder / "data", 24, text_only_every=3)
    make_records(folder / "data", 24, name="captions.json")
    common = (*FSDP, "--max_steps", str(STEPS), "--gradient_accumulation_steps", str(MICRO_BATCHES))

    def start(name: str, *more: str, records: str = data.name):
        done = launch(1, FSDP_ON_CPU, *flags(folder / name, data.with_name(records), base, *common, *more))
        return losses(folder / name), json.loads(done.stdout.strip().splitlines()[-1])

    return start


def test_gradients_are_summed_in_float32_without_copies_and_weights_cast_once_a_step(run):
    whole, _ = run("whole")
    kept, seen = run("kept", "--bf16", "True")
    anew, seen_anew = run("anew", "--bf16", "True", "--keep_half_weights", "False")
    assert len(kept) == STEPS and kept == pytest.approx(whole, abs=2e-2) and kept == anew
    for found in (seen, seen_anew):
        assert found["type"] == "DistributedType.FSDP" and found["sharded"] == found["parameters"] > 0
        # Sums of three bfloat16 gradients that bfloat16 couldn't hold.
        assert found["gradient_dtypes"] == ["torch.float32"] and found["gradients_in_bf16"] < 0.5
        assert found["joined_gradients"] == 0
    # Once a step, and once before the first; few other casts look alike.
    assert seen["large"] <= seen["casts"] / (STEPS + 1) < 1.2 * seen["large"]
    assert seen_anew["casts"] > MICRO_BATCHES * seen["casts"]


@contextmanager
def fake_world():
    """A process group of one process."""
    torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_weights_are_cast_once_for_all_steps(run):
    stage = ("--tune_mm_mlp_adapter", "True", "--version", "plain")
    stage_1, seen = run("stage_1", "--bf16", "True", *stage, records="captions.json")
    assert len(stage_1) == STEPS
    # Once before the first step, once in it; the few of the projector in every step.
    assert seen["large"] <= seen["casts"] < 3 * seen["large"] < (STEPS + 1) * seen["large"]


def test_what_adapters_are_on_is_cast_once_for_the_run(run):
    """Not as often as the adapters, which a step changes."""
    lora = ("--lora_enable", "True", "--lora_dropout", "0")
    whole, _ = run("lora_whole", *lora)
    half, seen = run("lora", "--bf16", "True", *lora)
    assert len(half) == STEPS and half == pytest.approx(whole, abs=2e-2)
    assert seen["gradient_dtypes"] == ["torch.float32"]
    assert 0 < seen["sharded"] < seen["parameters"]
    assert seen["large_trained"] <= seen["casts"] / (STEPS + 1) < 1.1 * seen["large_trained"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_adapters_in_half_precision_resume_bit_equal(tmp_path, processes):
    base, data = make_llava(tmp_path / "base"), make_records(tmp_path / "data", 24, text_only_every=3)

    def start(folder, *more):
        launch(processes, FSDP_ON_CPU, *flags(folder, data, base, *more))

    whole, killed = resumed(start, tmp_path, *FSDP, "--bf16", "True", "--lora_enable", "True")
    assert losses(killed) == losses(whole) and len(losses(whole)) == 6
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, killed))
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    first, second = (torch.load(folder / NON_LORA, weights_only=True) for folder in (whole, killed))
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def test_on_several_gpus_frozen_weights_are_whole_where_they_would_be_gathered(tmp_path):
    """The same losses as with sharded ones, after a resume too."""
    base, data = make_llava(tmp_path / "base"), make_records(tmp_path / "data", 24, text_only_every=3)
    seen = {}

    def start(folder, *more):
        done = launch(2, FSDP_ON_CPU, *flags(folder, data, base, *more, "--bf16", "True", "--lora_enable", "True"))
        seen[folder.name] = json.loads(done.stdout.strip().splitlines()[-1])

    start(tmp_path / "sharded", *FSDP, *RUN, "--max_steps", "6", "--save_strategy", "no")
    gathered = ("--fsdp", "True", "--fsdp_config", '{"reshard_after_forward": false}')
    whole, killed = resumed(start, tmp_path, *gathered)
    assert losses(killed) == losses(whole) == pytest.approx(losses(tmp_path / "sharded"), abs=1e-6)
    assert len(losses(whole)) == 6
    assert seen["sharded"]["sharded"] == seen["sharded"]["parameters"]
    assert seen["whole"]["large_trained"] <= seen["whole"]["sharded"] < seen["whole"]["parameters"]


@pytest.mark.parametrize("cast", [True, False])
def test_frozen_weights_in_the_dtype_of_the_computation_are_used_as_they_are(cast):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def stepped(alone: bool) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].requires_grad_(False)
        model[2].requires_grad_(False).to(torch.bfloat16)
        modules = frozen_as_computed(model, torch.bfloat16, torch.device("cpu"), cast=cast) if alone else []
        ignored = {parameter for module in modules for parameter in module.parameters()}
        assert [module in modules for module in model] == [False, alone and cast, alone]
        for unit in (*model, model):
            fully_shard(unit, mp_policy=policy, ignored_params=ignored)
        model(torch.ones(4, 8)).sum().backward()
        return model

    with fake_world():
        first, second = stepped(False), stepped(True)
        assert [isinstance(layer.weight, DTensor) for layer in second] == [True, not cast, False]
        kept = KeptCopies(second, 10**6)
        assert kept.trained == [second[0]] and kept.frozen == ([] if cast else [second[1]])
        assert first[0].weight.grad.to_local().equal(second[0].weight.grad.to_local())


def accelerator(**changed) -> Namespace:
    plugin = Namespace(fsdp_version=changed.pop("version", 2), cpu_offload=changed.pop("offload", None))
    return Namespace(
        **{"state": Namespace(fsdp_plugin=plugin), "num_processes": 1, "mixed_precision": "bf16"} | changed
    )


def test_what_a_group_of_one_is():
    from torch.distributed.fsdp import CPUOffloadPolicy

    assert is_group_of_one(accelerator()) and is_group_of_one(accelerator(mixed_precision="fp16"))
    for changed in ({"num_processes": 2}, {"mixed_precision": "no"}, {"version": 1}, {"offload": CPUOffloadPolicy()}):
        assert not is_group_of_one(accelerator(**changed))
    assert not is_group_of_one(Namespace(state=Namespace()))


@pytest.mark.parametrize(
    ("optimizer", "frozen", "bytes_each"),
    [
        ("adamw_torch_fused", False, 16),
        ("adamw_torch_8bit", False, 10),
        ("adamw_torch_4bit", False, 9),
        ("adamw_torch_fused", True, 4),
    ],
)
def test_free_for_copies_is_what_weights_gradients_and_moments_leave(optimizer, frozen, bytes_each):
    with torch.device("meta"):
        model = nn.Linear(1000, 1000, bias=False).requires_grad_(not frozen)
    memory = int(bytes_each * 10**6 / SHARE_FOR_WEIGHTS)
    assert free_for_copies(model, optimizer, memory) == pytest.approx(0, abs=10)
    assert free_for_copies(model, optimizer, 2 * memory) == pytest.approx(bytes_each * 10**6, rel=1e-3)
    assert free_for_copies(model, optimizer, memory // 2) == 0


def test_copies_are_kept_of_as_many_units_as_there_is_room_for_trained_ones_first():
    with fake_world():
        model = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(4)))
        model[0].requires_grad_(False)
        for unit in (*model, model):
            fully_shard(unit, reshard_after_forward=False)
        all_kept, some, none = (KeptCopies(model, room) for room in (800, 650, 0))
    assert all_kept.bytes == 800 and all_kept.frozen == [model[0]] and all_kept.trained == [*model[1:]]
    assert some.bytes == 600 and some.anew == [model[0]]
    assert none.bytes == 0 and {*model} <= {*none.anew}
