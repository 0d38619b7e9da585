"""FSDP 2 on a single GPU without what it does for others: copies of weights and gradients in every micro-batch.

FSDP 2 makes the half-precision weights anew for each pass over a layer, and copies each micro-batch's gradients twice
before it adds them to the float32 sum. With one process nothing is exchanged: gradients are added where they arise,
and of as many layers as memory allows the half-precision weights stay from the first micro-batch of an optimizer step
to the last, of frozen ones for good. Frozen weights that are in half precision themselves need no copy.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.training_args import OptimizerNames

from llava.errors import LlavaError
from llava.train.step import gpu
from llava.train.step.hardware import OPTIMIZER_BYTES

logger = logging.getLogger(__name__)

SHARE_FOR_WEIGHTS = 0.79
"""Of the GPU's memory, for weights, gradients and moments; the rest is left to activations."""


def is_group_of_one(accelerator) -> bool:
    """Whether this run is sharded with FSDP 2 in half precision over one process, with nothing offloaded."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or accelerator.num_processes > 1:
        return False
    return accelerator.mixed_precision in {"bf16", "fp16"} and not is_offloaded(plugin)


def set_up_alone(plugin, model: nn.Module, training) -> None:
    """Tell accelerate's FSDP plugin what of `model` to shard and when to free copies; `training`: the parsed flags."""
    plugin.reshard_after_forward = training.keep_half_weights is False
    dtype = plugin.mixed_precision_policy.param_dtype
    # Adapters are saved without the weights that they are on.
    plugin.ignored_modules = frozen_as_computed(model, dtype, training.device, cast=training.lora_enable)


def replicate_frozen(accelerator, model: nn.Module, training) -> None:
    """Tell accelerate's FSDP 2 to leave frozen weights whole on each of several GPUs, where it would gather them for
    every micro-batch and keep the copies until its end: in half precision without `reshard_after_forward`."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or plugin.reshard_after_forward or is_offloaded(plugin):
        return
    dtype = plugin.mixed_precision_policy.param_dtype
    if dtype is not None:
        plugin.ignored_modules = frozen_as_computed(model, dtype, training.device, cast=training.lora_enable)


def is_offloaded(plugin) -> bool:
    """Whether accelerate's FSDP plugin keeps weights on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(plugin.cpu_offload, CPUOffloadPolicy)


def frozen_as_computed(model: nn.Module, dtype: torch.dtype, device: torch.device, *, cast: bool) -> list[nn.Module]:
    """Modules whose weights are all frozen and in `dtype`, which FSDP 2 is to leave alone: they are used as they are.

    Args:
        model: not yet wrapped.
        dtype: that the run computes in.
        device: where the weights of these modules are moved to; FSDP would move its own.
        cast: whether frozen weights of other dtypes are cast first, once for the run; not where they will be saved.
    """
    found = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not own or next(module.children(), None) is not None or _are_trained(own):
            continue
        if not all(parameter.dtype == dtype or (cast and parameter.is_floating_point()) for parameter in own):
            continue
        for parameter in own:
            parameter.data = parameter.data.to(device, dtype)
        found.append(module)
    return found


class KeptCopies:
    """Half-precision weights that are kept over an optimizer step: of as many units of FSDP 2 as `room` bytes hold.

    Args:
        model: wrapped by `fully_shard` over one process without `reshard_after_forward`, before its first step.
        room: in bytes; trained units come first, for they are made anew more often.
    """

    def __init__(self, model: nn.Module, room: float):
        self.model = model
        self.trained: list[FSDPModule] = []
        self.frozen: list[FSDPModule] = []
        self.anew: list[FSDPModule] = []
        self.bytes = 0
        units = [(unit, _own_parameters(unit)) for unit in model.modules() if isinstance(unit, FSDPModule)]
        for unit, parameters in sorted(units, key=lambda one: not _are_trained(one[1])):
            if not parameters:
                continue
            size = 2 * sum(parameter.numel() for parameter in parameters)
            if self.bytes + size > room:
                self.anew.append(unit)
                continue
            self.bytes += size
            (self.trained if _are_trained(parameters) else self.frozen).append(unit)
        self.set_up()

    def set_up(self) -> None:
        """Tell each unit whether it keeps its copies; to be called again after something else has told it so."""
        for unit in self.anew:
            if unit is not self.model:  # what is needed at a pass's end and at once in the backward pass
                unit.set_reshard_after_forward(True, recurse=False)
        for unit in (*self.trained, *self.frozen):
            unit.set_reshard_after_forward(False, recurse=False)
        for unit in self.frozen:
            unit.set_reshard_after_backward(False, recurse=False)

    def begin_micro_batch(self, is_last: bool) -> None:
        """`is_last`: of an optimizer step, which changes the trained weights."""
        for unit in self.trained:
            unit.set_reshard_after_backward(is_last, recurse=False)


def keep_copies(training, model: nn.Module) -> KeptCopies:
    """Keep half-precision weights as `--keep_half_weights` says (`training`: the parsed flags), else as many as fit;
    `model` as `KeptCopies` takes it."""
    room = 0.0 if training.keep_half_weights is False else math.inf
    if training.keep_half_weights is None and gpu.is_on_gpu(training.device):
        room = free_for_copies(model, OptimizerNames(training.optim).value, gpu.memory_bytes(training.device))
    kept = KeptCopies(model, room)
    whole = 2 * sum(parameter.numel() for parameter in model.parameters() if isinstance(parameter, DTensor))
    logger.info(
        "half-precision weights: %.1f of %.1f GB are kept over an optimizer step, the others made anew layer by layer "
        "(--keep_half_weights True keeps all, False none)",
        kept.bytes / 1e9, whole / 1e9,
    )  # fmt: skip
    return kept


def free_for_copies(model: nn.Module, optimizer: str, memory: int) -> float:
    """Bytes that are free for half-precision copies in addition to weights, gradients and moments.

    Args:
        optimizer: the Trainer's name of it.
        memory: of the GPU, in bytes.
    """
    moments = next((size for name, size in OPTIMIZER_BYTES.items() if name in optimizer), 8)
    needed = 0.0
    for parameter in model.parameters():
        # Trained weights, their gradients and sums are float32.
        needed += parameter.numel() * (8 + moments if parameter.requires_grad else parameter.element_size())
    return max(SHARE_FOR_WEIGHTS * memory - needed, 0.0)


def _own_parameters(unit: nn.Module) -> list[nn.Parameter]:
    """The parameters of a unit that are in no unit within it, and that FSDP 2 doesn't leave alone."""
    inner = {
        parameter
        for module in unit.modules()
        if module is not unit and isinstance(module, FSDPModule)
        for parameter in module.parameters()
    }
    return [one for one in unit.parameters() if isinstance(one, DTensor) and one not in inner]


def _are_trained(parameters: Sequence[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


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


def train_rows_alone(model: nn.Module, weight: torch.Tensor, rows: Sequence[int]) -> None:
    """Let the gradient of `weight`, a parameter of `model`, be zero but for `rows`.

    To be called when the model is wrapped: FSDP 2 computes with other tensors, to which hooks don't go over.
    """
    computed = next(iter([computed for _, kept, computed in _pairs(model) if kept is weight]), weight)
    places = torch.tensor(rows, device=computed.device)  # a list would be waited for in each step

    def keep_rows(gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient).index_copy_(0, places, gradient.index_select(0, places))

    computed.register_hook(keep_rows)


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, what the optimizer has, what the model computes with) of each parameter, gathered a group at a time."""
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
