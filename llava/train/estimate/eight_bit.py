"""bitsandbytes' 8-bit operators on tensors without content, as if no column had outliers.

How many columns have some depends on values, and the host waits to know it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _quantized_rows(rows: torch.Tensor, threshold: float = 0.0):
    scales = rows.new_empty(rows.numel() // rows.shape[-1], dtype=torch.float32)
    return rows.new_empty(rows.shape, dtype=torch.int8), scales, _none(rows) if threshold else None


def _product(rows: torch.Tensor, quantized: torch.Tensor, weight: torch.Tensor, *_, **__):
    return rows.new_empty((*quantized.shape[:-1], weight.shape[0])), rows.new_empty(quantized.shape[0], 0)


def _none(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(0, dtype=torch.int64)


WITHOUT_OUTLIERS: dict[str, Callable] = {
    "bitsandbytes::int8_vectorwise_quant": _quantized_rows,
    "bitsandbytes::int8_mixed_scaled_mm": _product,
}
"""What takes an operator's place, by its name."""


@contextmanager
def multiplied_as_on_gpus() -> Iterator[None]:
    """Within, layers in training multiply 8-bit weights as they do on GPUs, though tensors lie on the CPU."""
    functions: Any = sys.modules.get("bitsandbytes.autograd._functions")
    if functions is None:
        yield
        return
    of_cpus = functions.MatMul8bitFp
    functions.MatMul8bitFp = functions.MatMul8bitLt
    try:
        yield
    finally:
        functions.MatMul8bitFp = of_cpus


def product_flops(name: str, args) -> int:
    """Floating-point operations of one of bitsandbytes' products, 0 of anything else."""
    if name == "bitsandbytes::int8_mixed_scaled_mm":
        quantized, weight = args[1], args[2]
    elif name == "bitsandbytes::int8_scaled_mm":
        quantized, weight = args[0], args[1]
    else:
        return 0
    return 2 * quantized.numel() * weight.shape[0]
