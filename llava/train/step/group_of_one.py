"""FSDP 2 on a single GPU without what it does for others: copies of weights and gradients in every micro-batch.

FSDP 2 makes the half-precision weights anew for each pass over a layer, and copies each micro-batch's gradients twice
before it adds them to the float32 sum. With one process nothing is exchanged: gradients are added where they arise,
and where memory allows the half-precision weights stay from the first micro-batch of an optimizer step to the last.
"""

import logging
from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.training_args import OptimizerNames

from llava.errors import LlavaError
from llava.train.hardware import OPTIMIZER_BYTES
from llava.train.step import gpu

logger = logging.getLogger(__name__)

SHARE_FOR_WEIGHTS = 0.85
"""Of the GPU's memory, for weights, gradients and moments; the rest is left to activations."""


def is_group_of_one(accelerator) -> bool:
    """Whether this run is sharded with FSDP 2 in half precision over one process, with nothing offloaded."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or accelerator.num_processes > 1:
        return False
    from torch.distributed.fsdp import CPUOffloadPolicy

    return accelerator.mixed_precision in {"bf16", "fp16"} and not isinstance(plugin.cpu_offload, CPUOffloadPolicy)


def keeps_copies(training, model: nn.Module) -> bool:
    """Whether the half-precision weights are kept over an optimizer step: as `--keep_half_weights` says (`training`:
    the parsed flags), else where they fit."""
    kept = training.keep_half_weights
    if kept is None:
        memory = gpu.memory_bytes(training.device) if gpu.is_on_gpu(training.device) else None
        kept = memory is None or copies_fit(model, OptimizerNames(training.optim).value, memory)
    size = 2 * sum(parameter.numel() for parameter in model.parameters()) / 1e9
    logger.info(
        "half-precision weights (%.1f GB) are %s; --keep_half_weights %s for the other way",
        size, "kept over an optimizer step" if kept else "made anew layer by layer", not kept,
    )  # fmt: skip
    return kept


def copies_fit(model: nn.Module, optimizer: str, memory: int) -> bool:
    """Whether half-precision copies of all weights fit in addition to weights, gradients and moments.

    Args:
        optimizer: the Trainer's name of it.
        memory: of the GPU, in bytes.
    """
    moments = next((size for name, size in OPTIMIZER_BYTES.items() if name in optimizer), 8)
    needed = 0.0
    for parameter in model.parameters():
        # Trained weights, their gradients and sums are float32.
        needed += parameter.numel() * (2 + (8 + moments if parameter.requires_grad else parameter.element_size()))
    return needed <= SHARE_FOR_WEIGHTS * memory


def add_gradients_at_once(model: nn.Module) -> None:
    """Let each parameter's gradient be added to its float32 sum as soon as it is there, without FSDP's copies.

    Args:
        model: wrapped by `fully_shard` over one process, before its first step.
    """
    unpaired = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and isinstance(parameter, DTensor)
    }
    for name, kept, computed in _pairs(model):
        if name in unpaired:  # modules may share a group, which then comes once for each
            unpaired.remove(name)
            computed.register_post_accumulate_grad_hook(partial(_move_gradient, cast(DTensor, kept)))
    if unpaired:
        raise LlavaError(f"--fsdp: {min(unpaired)} is never gathered, so its gradient can't be summed in float32")


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, what the optimizer has, what the model computes with) of each parameter, gathered a group at a time."""
    from torch.distributed.fsdp import FSDPModule

    sharded = dict(model.named_parameters())
    for module in model.modules():  # the root comes first: it sets up the others
        if isinstance(module, FSDPModule):
            module.unshard()
            found = [
                (name, parameter) for name, parameter in model.named_parameters() if parameter is not sharded[name]
            ]
            yield from ((name, sharded[name], parameter) for name, parameter in found)
            module.reshard()


@torch.no_grad()
def _move_gradient(kept: DTensor, computed: torch.Tensor) -> None:
    gradient, computed.grad = cast(torch.Tensor, computed.grad), None
    total = cast(DTensor | None, kept.grad)
    if total is None:
        whole = gradient.to(kept.dtype)
        kept.grad = DTensor.from_local(whole, kept.device_mesh, kept.placements, run_check=False)
    else:
        total.to_local().add_(gradient)
