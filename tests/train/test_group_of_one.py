"""FSDP 2 over one process: the same losses with float32 gradients, and none of the copies it makes for others."""

import json
from argparse import Namespace

import pytest
import torch
from torch import nn

from llava.train.step.group_of_one import copies_fit, is_group_of_one
from tests.tiny import make_llava
from tests.train.helpers import flags, losses, make_records
from tests.train.test_distributed import FSDP, FSDP_ON_CPU, launch

MICRO_BATCHES = 3
STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(name, *flags)`: (losses, what fsdp_on_cpu has seen) of a run over one process."""
    folder = tmp_path_factory.mktemp("group")
    base, data = make_llava(folder / "base"), make_records(folder / "data", 24, text_only_every=3)
    common = (*FSDP, "--max_steps", str(STEPS), "--gradient_accumulation_steps", str(MICRO_BATCHES))

    def start(name: str, *more: str):
        done = launch(1, FSDP_ON_CPU, *flags(folder / name, data, base, *common, *more))
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
    [("adamw_torch_fused", False, 18), ("adamw_torch_8bit", False, 12), ("adamw_torch_fused", True, 6)],
)
def test_copies_are_kept_where_they_fit(optimizer, frozen, bytes_each):
    with torch.device("meta"):
        model = nn.Linear(1000, 1000, bias=False).requires_grad_(not frozen)
    needed = bytes_each * 10**6 / 0.85
    assert copies_fit(model, optimizer, int(needed * 1.01)) and not copies_fit(model, optimizer, int(needed * 0.99))
