"""bitsandbytes' 4-bit Linear, computed in one exact way on every CPU; on other devices it is the library's own.

A CPU multiplies by the dequantized weight. bitsandbytes 0.50 does it otherwise on some processors, and not rightly:

- With AVX512-BF16 it repacks the weights in evaluation mode. That stops at an input width that isn't a multiple
  of the block (64) or an output width that isn't one of 32; rounds scales and activations to bfloat16; leaves
  weights without gradient when training goes on; and quantizes the scales anew when the model is saved.
- With AVX512 its dequantization starts each row at a new block. Blocks run on over the ends of rows, so weights
  whose width is a multiple of 16 but not of the block get other rows' scales.
"""

import copy

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """`[..., in_features]` to `[..., out_features]` in the input's dtype; computes in `compute_dtype`."""

    weight: bitsandbytes.nn.Params4bit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        inner = x.to(self.compute_dtype or x.dtype)
        result = _Product.apply(inner, self.weight, self.weight.quant_state)
        if self.bias is not None:
            result = result + self.bias.to(result.dtype)
        return result.to(x.dtype)


class _Product(torch.autograd.Function):
    """Input times frozen weight. Only the packed weight is kept for the backward pass, which dequantizes it again."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, packed: torch.Tensor, state: QuantState) -> torch.Tensor:
        ctx.packed, ctx.state = packed, state
        return torch.nn.functional.linear(x, dequantized(packed, state, x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ dequantized(ctx.packed, ctx.state, gradient.dtype), None, None


def dequantized(packed: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[out_features, in_features]` in `dtype`, of the packed one on a CPU.

    The library is shown one block as one row, so that it finds each block's scale whatever the weight's width.
    """
    blocks = copy.copy(state)
    count = state.shape.numel()
    whole = count % state.blocksize == 0
    blocks.shape = torch.Size([count // state.blocksize, state.blocksize] if whole else [1, count])
    blocks.dtype = dtype
    return dequantize_4bit(packed.detach(), blocks).reshape(state.shape)


def compute_exactly(model: torch.nn.Module) -> None:
    """Give all of bitsandbytes' 4-bit Linears in `model` this module's forward pass, in place."""
    for module in model.modules():
        if type(module) is bitsandbytes.nn.Linear4bit:
            # Parameters, hooks and what transformers noted on the module stay; torch's fully_shard does the same.
            module.__class__ = Linear4bit
