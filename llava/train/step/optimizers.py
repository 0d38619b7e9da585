"""Optimizers with small moments: torchao's, which takes sharded tensors and rounds at random, and those that take none.

The latter are bitsandbytes' and Adafactor.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
"""The Trainer's names of torchao's optimizers."""
PROJECTOR, TOWER = "mm_projector", "vision_tower"
_PLAIN = ("bnb", "adamw_8bit", "ademamix", "lion", "paged", "adafactor")
"""Parts of the Trainer's names of bitsandbytes' optimizers and of transformers' own."""


def takes_plain_tensors(name: str) -> bool:
    """Whether the optimizer of this name takes no sharded tensors: bitsandbytes' kernels and Adafactor's sums don't."""
    return any(part in name for part in _PLAIN)


def parameter_groups(
    model: nn.Module,
    *,
    decayed: set[str],
    weight_decay: float,
    projector_lr: float | None,
    tower_lr: float | None,
) -> list[dict]:
    """Optimizer groups of the trainable parameters: (own learning rate or the common one) × (decay or not).

    Groups come in the order language model, projector, tower, each with decay first; empty ones are left out.
    """
    rates = {"": None, PROJECTOR: projector_lr, TOWER: tower_lr}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {
        (part, decay): [] for part in rates for decay in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((key for key in (PROJECTOR, TOWER) if key in name and rates[key] is not None), "")
            members[part, name in decayed].append(parameter)
    groups = []
    for (part, decay), parameters in members.items():
        if not parameters:
            continue
        group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay if decay else 0.0}
        if rates[part] is not None:
            group["lr"] = rates[part]
        groups.append(group)
    return groups


def on_own_parts(optimizer_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class of an optimizer of plain tensors whose step updates what this process holds of each parameter.

    Moments are plain tensors then; over several processes they couldn't be saved.
    """
    return type(optimizer_class.__name__, (_OnOwnParts, optimizer_class), {})


def with_float32_moments(optimizer_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class of an optimizer of torchao whose quantized moments stand for float32 numbers, whatever the weights are.

    torchao's own stand for numbers of the weight's dtype, and forget so once they are sharded.
    """

    class WithFloat32Moments(optimizer_class):  # type: ignore[misc, valid-type]
        @staticmethod
        def _subclass_zeros(weight: torch.Tensor, *args: Any) -> torch.Tensor:
            like = weight.new_empty((), dtype=torch.float32).expand(weight.shape)
            return optimizer_class._subclass_zeros(like, *args)  # type: ignore[attr-defined]

    return WithFloat32Moments


class _OnOwnParts:
    """Stands before an optimizer's class: its step sees plain tensors in place of sharded ones, with the same state."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[torch.Tensor, dict[str, Any]]

    @torch.no_grad()
    def step(self, closure=None):
        with self._plain():
            return super().step(closure)  # type: ignore[misc]  # the optimizer's

    @contextmanager
    def _plain(self) -> Iterator[None]:
        given, state = [group["params"] for group in self.param_groups], self.state
        self.state = defaultdict(dict)
        for group in self.param_groups:
            plain = [_own_part(parameter) for parameter in group["params"]]
            for parameter, part in zip(group["params"], plain):
                if part.grad is not None:
                    self.state[part] = state[parameter]
            group["params"] = plain
        try:
            yield
        finally:
            self.state = state
            for group, parameters in zip(self.param_groups, given):
                group["params"] = parameters


def _own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter, with its gradient; they share memory."""
    if not isinstance(parameter, DTensor):
        return parameter
    part = parameter.to_local().detach()
    gradient = cast(DTensor | None, parameter.grad)
    part.grad = None if gradient is None else gradient.to_local()
    return part
