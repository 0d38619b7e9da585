"""Products of linear modules on the CPU, by oneDNN.

torch gives float32 products to MKL, which reads weights at less than half the speed of memory on some processors
(benchmarks/cpu_products.py). oneDNN, which torch brings along too, does not.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

_PRODUCT: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""What torch.compile makes of a linear module; None in builds without oneDNN."""

_MOST_ROWS = 16_384
"""Of one product; more are computed in parts."""
_MOST_ADDED = 1024
"""Rows by which two sizes of products differ at most."""
_LEAST_BYTES, _LEAST_PRODUCTS = 1 << 20, 1 << 22
"""Of a weight that the processor's caches don't keep, and of a product that is worth oneDNN's start: what is below both
is faster by torch's own."""


class OneDnnLinear(nn.Linear):
    """A linear module for answering: see `product`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return product(self, input)


PLAIN_LINEAR = (nn.Linear, OneDnnLinear)
"""The classes of modules that are a weight, a bias and nothing else."""


def has_onednn() -> bool:
    return _PRODUCT is not None


def product(module: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """What `nn.Linear` computes; of float32 on the CPU, where no gradient is asked for, by oneDNN."""
    weight, bias = module.weight, module.bias
    is_float32 = states.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if _PRODUCT is None or torch.is_grad_enabled() or not is_float32 or not states.is_cpu:
        return linear(states, weight, bias)
    rows = states.reshape(-1, states.shape[-1])
    if weight.nbytes < _LEAST_BYTES and len(rows) * weight.numel() < _LEAST_PRODUCTS:
        return linear(states, weight, bias)
    parts = rows.split(_MOST_ROWS) if len(rows) > _MOST_ROWS else (rows,)
    made = [_product(part, weight, bias) for part in parts]
    whole = made[0] if len(made) == 1 else torch.cat(made)
    return whole.view(*states.shape[:-1], len(weight))


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    count = len(rows)
    added = padded_rows(count) - count
    made = _PRODUCT(pad(rows, (0, 0, 0, added)) if added else rows, weight, bias, "none", [], "")
    return made[:count] if added else made


def padded_rows(count: int) -> int:
    """The rows that a product of `count` rows is computed with: up to 8 as they are, then four sizes for each doubling,
    and from 8,192 one for each 1,024.

    oneDNN makes code for each number of rows that it meets and keeps it: 4,800 products of 1 to 1,200 rows left 2.7 GB
    behind, padded ones 0.1 GB.
    """
    if count <= 8:
        return count
    step = min(1 << (count - 1).bit_length() - 3, _MOST_ADDED)
    return -(-count // step) * step


def use_onednn(model: nn.Module) -> None:
    """Have the plain linear modules of a model compute by `product`, all but quantized and hooked ones.

    Names and weights stay as they are, and so does what a training step computes.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            module.__class__ = OneDnnLinear
