"""Decoder layers in few operations: one product for queries, keys and values, one for gate and up, norms in one kernel.

LLaMA's, Mistral's and Qwen2's layers, where their weights are plain tensors on one device: what is quantized, hooked or
of another form goes through the library's modules. The joined weights are the memory of the modules' own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm

from llava.generation.attention.passes import Layer
from llava.model.products import PLAIN_LINEAR

PARTS = {
    "self_attn": (LlamaAttention, MistralAttention, Qwen2Attention),
    "mlp": (LlamaMLP, MistralMLP, Qwen2MLP),
    "input_layernorm": (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm),
    "post_attention_layernorm": (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm),
}


class Rotation(Protocol):
    """The positions of a pass's tokens, as rotary embeddings."""

    def put(self, projected: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Turn queries and keys of `projected` `[tokens, heads + 2 kv_heads, head_dim]`, put keys and values into the
        slots (int64 `[tokens]`) of `pages`, and return the queries `[tokens, heads, head_dim]`."""
        ...


class Attending(Protocol):
    """A pass (`PagedPass`, say)."""

    def attend_projected(
        self, layer: Layer, projected: torch.Tensor, rotation: Rotation, scale: float
    ) -> torch.Tensor: ...


class JoinedLayer:
    """One block, as its modules but for rounding; `kernels` are torch's (`Plain`), or do the same."""

    def __init__(self, block: Any, kernels: "Kernels"):
        attention, mlp = block.self_attn, block.mlp
        self.kernels = kernels
        self.layer_idx: int = attention.layer_idx
        self.scale: float = attention.scaling
        size = attention.head_dim
        self.qkv, self.qkv_bias = _joined((attention.q_proj, attention.k_proj, attention.v_proj))
        self.heads = self.qkv.shape[0] // size
        self.out, self.out_bias = attention.o_proj.weight.T, attention.o_proj.bias
        self.gate_up, self.gate_up_bias = _joined((mlp.gate_proj, mlp.up_proj))
        self.down, self.down_bias = mlp.down_proj.weight.T, mlp.down_proj.bias
        self.norms = [
            (norm.weight, norm.variance_epsilon) for norm in (block.input_layernorm, block.post_attention_layernorm)
        ]

    def __call__(self, hidden: torch.Tensor, rotation: Rotation, attending: Attending) -> torch.Tensor:
        """`hidden` `[tokens, hidden]` is changed in place."""
        (first, epsilon), (second, other) = self.norms
        projected = linear(self.kernels.normed(hidden, first, epsilon), self.qkv, self.qkv_bias)
        projected = projected.unflatten(1, (self.heads, -1))
        _add_product(hidden, attending.attend_projected(self, projected, rotation, self.scale), self.out, self.out_bias)
        gate_up = linear(self.kernels.normed(hidden, second, other), self.gate_up, self.gate_up_bias)
        _add_product(hidden, self.kernels.gated(gate_up), self.down, self.down_bias)
        return hidden


class Kernels(Protocol):
    """What lies between products."""

    def normed(self, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """RMSNorm of `[tokens, hidden]`."""
        ...

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of `[tokens, 2 * inner]`."""
        ...


class Plain:
    """Torch's."""

    @staticmethod
    def normed(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return rms_norm(hidden, weight.shape, weight, epsilon)

    @staticmethod
    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, 1)
        return silu(gate).mul_(up)


class Tables:
    """Cosines and sines of every position, so that a pass only looks them up.

    In a pass of few tokens values have cosine 1 and sine 0: turned with queries and keys they stay as they are, in one
    kernel with them.
    """

    FEW = 256

    def __init__(self, rotary: Any, positions: int, like: torch.Tensor, heads: int, kv_heads: int, fused: Any = None):
        """
        Args:
            like: a tensor of the model's dtype, on its device.
            fused: the module of kernels, where they run.
        """
        self.fused = fused
        frequencies = rotary.inv_freq.to(like.device, torch.float32)
        angles = torch.arange(positions, device=like.device).unsqueeze(1) * frequencies
        cos, sin = (one.mul(rotary.attention_scaling).to(like.dtype) for one in (angles.cos(), angles.sin()))
        cos, sin = torch.stack([cos, cos], 1), torch.stack([-sin, sin], 1)
        self.cos = torch.stack([cos, torch.ones_like(cos)], 1)
        """`[positions, 2, 2, head_dim / 2]`: of what is turned and of what isn't, both halves."""
        self.sin = torch.stack([sin, torch.zeros_like(sin)], 1)
        self.kinds = (torch.arange(heads + 2 * kv_heads, device=like.device) >= heads + kv_heads).long()
        """Of each projected head, 0 if it is turned (queries and keys), 1 if not (values)."""

    def of(self, positions: torch.Tensor) -> Rotation:
        """For tokens at `positions`, int64 `[tokens]`."""
        if self.fused is not None:
            return FusedRotation(self.fused, self.cos[:, 0, 0], self.sin[:, 0, 1], positions)
        cos, sin = (table.index_select(0, positions) for table in (self.cos, self.sin))
        if len(positions) > self.FEW:
            return TabledRotation(cos.narrow(1, 0, 1), sin.narrow(1, 0, 1))
        return TabledRotation(cos.index_select(1, self.kinds), sin.index_select(1, self.kinds))


class TabledRotation(NamedTuple):
    """A `Rotation`: both `[tokens, heads + 2 kv_heads, 2, head_dim / 2]`, or `[tokens, 1, …]` for many tokens."""

    cos: torch.Tensor
    sin: torch.Tensor

    def put(self, projected: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        kv_heads = pages.shape[3]
        heads = projected.shape[1] - 2 * kv_heads
        if self.cos.shape[1] > 1:
            turned = rotated(projected, self.cos, self.sin)
            states = turned.narrow(1, heads, 2 * kv_heads).unflatten(1, (2, kv_heads))
        else:
            turned = rotated(projected.narrow(1, 0, heads + kv_heads), self.cos, self.sin)
            keys, values = turned.narrow(1, heads, kv_heads), projected.narrow(1, heads + kv_heads, kv_heads)
            states = torch.stack([keys, values], 1)
        pages.flatten(0, 1).index_copy_(0, slots, states)
        return turned.narrow(1, 0, heads)


class FusedRotation(NamedTuple):
    """A `Rotation` in one kernel, `fused.put_rotated`."""

    fused: Any
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor

    def put(self, projected: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        queries: torch.Tensor = self.fused.put_rotated(projected, self.cos, self.sin, self.positions, slots, pages)
        return queries


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads `[tokens, heads, head_dim]` turned by their positions: transformers' rotary embedding, in three kernels."""
    halves = states.unflatten(2, (2, -1))
    turned: torch.Tensor = (halves * cos).addcmul_(halves.flip(2), sin)
    return turned.flatten(2)


def join_layers(blocks: Sequence[Any], fused: Any = None) -> list[JoinedLayer] | None:
    """The blocks as joined layers, None if one can't be; `fused` is the module of kernels, where they run."""
    if not all(_is_plain(block) for block in blocks):
        return None
    kernels = Plain() if fused is None else fused
    return [JoinedLayer(block, kernels) for block in blocks]


def has_fixed_tables(rotary: nn.Module) -> bool:
    """Whether a position's angles are the same however long the text is."""
    return getattr(rotary, "rope_type", None) in ("default", "linear", "llama3", "yarn")


def _is_plain(block: Any) -> bool:
    if any(type(getattr(block, name, None)) not in classes for name, classes in PARTS.items()):
        return False
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return (
        not any(hasattr(module, "_hf_hook") for module in block.modules())
        and len(linears) == 7
        and all(type(module) in PLAIN_LINEAR and not is_traceable_wrapper_subclass(module.weight) for module in linears)
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
        module.weight = nn.Parameter(part, module.weight.requires_grad)
    if all(module.bias is None for module in linears):
        return weight, None
    bias = torch.cat([module.bias.data for module in linears])
    for module, part in zip(linears, bias.split(sizes), strict=True):
        module.bias = nn.Parameter(part, module.bias.requires_grad)
    return weight, bias


def _add_product(hidden: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`hidden += states @ weight (+ bias)`."""
    hidden.addmm_(states, weight)
    if bias is not None:
        hidden.add_(bias)
