"""Decoder layers in few operations: one product for queries, keys and values, one for gate and up, norms in one kernel.

LLaMA's, Mistral's and Qwen2's layers, where their weights are plain tensors on one device: what is quantized, hooked or
of another form goes through the library's modules. The joined weights are the memory of the modules' own.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm

from llava.generation.attention.passes import Layer

PARTS = {
    "self_attn": (LlamaAttention, MistralAttention, Qwen2Attention),
    "mlp": (LlamaMLP, MistralMLP, Qwen2MLP),
    "input_layernorm": (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm),
    "post_attention_layernorm": (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm),
}


class Attending(Protocol):
    """A pass (`PagedPass`, say)."""

    def attend(
        self, layer: Layer, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor: ...


class JoinedLayer:
    """One block, as its modules but for rounding."""

    def __init__(self, block: nn.Module):
        attention, mlp = block.self_attn, block.mlp
        self.layer_idx: int = attention.layer_idx
        self.scale: float = attention.scaling
        size = attention.head_dim
        self.qkv, self.qkv_bias = _joined((attention.q_proj, attention.k_proj, attention.v_proj))
        self.heads = [linear.out_features // size for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.out, self.out_bias = attention.o_proj.weight.T, attention.o_proj.bias
        self.gate_up, self.gate_up_bias = _joined((mlp.gate_proj, mlp.up_proj))
        self.down, self.down_bias = mlp.down_proj.weight.T, mlp.down_proj.bias
        self.norms = [
            (norm.weight, norm.variance_epsilon) for norm in (block.input_layernorm, block.post_attention_layernorm)
        ]

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attending: Attending
    ) -> torch.Tensor:
        """`hidden` `[tokens, hidden]` is changed in place; `cos` and `sin` are `Tables.of`'s."""
        (first, epsilon), (second, other) = self.norms
        projected = linear(rms_norm(hidden, first.shape, first, epsilon), self.qkv, self.qkv_bias)
        queries, keys, values = self.heads
        projected = projected.unflatten(1, (queries + keys + values, -1))
        turning = projected.narrow(1, 0, queries + keys)
        turned = rotated(turning, cos, sin)
        attended = attending.attend(
            self,
            turned.narrow(1, 0, queries),
            turned.narrow(1, queries, keys),
            projected.narrow(1, queries + keys, values),
            self.scale,
        )
        _add_product(hidden, attended, self.out, self.out_bias)
        gate, up = linear(rms_norm(hidden, second.shape, second, other), self.gate_up, self.gate_up_bias).chunk(2, 1)
        _add_product(hidden, silu(gate).mul_(up), self.down, self.down_bias)
        return hidden


class Tables:
    """Cosines and sines of every position, so that a pass only looks them up."""

    def __init__(self, rotary: nn.Module, positions: int, like: torch.Tensor):
        cos, sin = (one.squeeze(0) for one in rotary(like, torch.arange(positions, device=like.device).unsqueeze(0)))
        half = cos.shape[1] // 2
        self.cos, self.sin = (one.narrow(1, 0, half) for one in (cos, sin))
        self.cos = torch.stack([self.cos, self.cos], 1)
        self.sin = torch.stack([-self.sin, self.sin], 1)

    def of(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both `[tokens, 1, 2, head_dim / 2]`."""
        cos, sin = (table.index_select(0, positions).unsqueeze(1) for table in (self.cos, self.sin))
        return cos, sin


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads `[tokens, heads, head_dim]` turned by their positions: transformers' rotary embedding, in three kernels."""
    halves = states.unflatten(2, (2, -1))
    return (halves * cos).addcmul_(halves.flip(2), sin).flatten(2)


def join_layers(blocks: Sequence[nn.Module]) -> list[JoinedLayer] | None:
    """The blocks as joined layers, None if one can't be."""
    if not all(_is_plain(block) for block in blocks):
        return None
    return [JoinedLayer(block) for block in blocks]


def has_fixed_tables(rotary: nn.Module) -> bool:
    """Whether a position's angles are the same however long the text is."""
    return getattr(rotary, "rope_type", None) in ("default", "linear", "llama3", "yarn")


def _is_plain(block: nn.Module) -> bool:
    if any(type(getattr(block, name, None)) not in classes for name, classes in PARTS.items()):
        return False
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return (
        not any(hasattr(module, "_hf_hook") for module in block.modules())
        and len(linears) == 7
        and all(type(module) is nn.Linear and type(module.weight) is nn.Parameter for module in linears)
        and len({parameter.device for parameter in block.parameters()}) == 1
        and isinstance(block.mlp.act_fn, nn.SiLU | type(_silu_of_library()))
    )


def _silu_of_library() -> nn.Module:
    from transformers.activations import ACT2FN

    found: nn.Module = ACT2FN["silu"]
    return found


def _joined(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (and biases) below each other; the modules' own become parts of them, so that memory holds them once."""
    sizes = [module.out_features for module in linears]
    weight = torch.cat([module.weight.data for module in linears])
    for module, part in zip(linears, weight.split(sizes), strict=True):
        module.weight.data = part
    if all(module.bias is None for module in linears):
        return weight, None
    bias = torch.cat([module.bias.data for module in linears])
    for module, part in zip(linears, bias.split(sizes), strict=True):
        module.bias.data = part
    return weight, bias


def _add_product(hidden: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`hidden += states @ weight (+ bias)`."""
    hidden.addmm_(states, weight)
    if bias is not None:
        hidden.add_(bias)
