"""Muon: momentum whose update is made orthogonal, matrix by matrix (Jordan et al. 2024), in float32.

`torch.optim.Muon` does its products in bfloat16, which a processor without such units does a hundred times slower.
"""

import math

import torch
from torch import nn

_STEPS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046))
"""Coefficients of the quintic iterations that drive all singular values towards 1."""


class Muon(torch.optim.Optimizer):
    """For the matrices between embedding and head; AdamW takes the rest.

    Updates have the size of AdamW's (root mean square 0.2 per unit of learning rate), so the rates compare.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.02):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._momentum(parameter, group["momentum"]) for parameter in parameters])
                scale = group["lr"] * 0.2 * math.sqrt(shape[1])
                for parameter, update in zip(parameters, orthogonal(updates)):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update if parameter.shape[0] == shape[0] else update.T, alpha=-scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's, with the shorter side first."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None, "step() leaves out parameters without a gradient"
        if "buffer" not in state:
            state["buffer"] = torch.zeros_like(parameter)
        state["buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(state["buffer"], momentum)
        return update if parameter.shape[0] <= parameter.shape[1] else update.T


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """`[n, rows, columns]`, rows <= columns: the same with all singular values near 1."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in _STEPS:
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
