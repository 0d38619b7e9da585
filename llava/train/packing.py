"""Attention for samples joined without padding: each sees itself alone.

Registered with transformers under `packed`; the collator gives the samples' borders (`cu_seq_lens_q`).
On a GPU it is one kernel of variable length (flash-attn, or torch's own); elsewhere SDPA sample by sample,
which does no work between samples, unlike a block mask over the whole batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "packed"


def use_packed_attention(config) -> None:
    """Let a model of this config attend within the samples of a packed batch."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    config._attn_implementation = NAME


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within samples.

    Args:
        query: `[1, heads, tokens, size]`; key and value may have fewer heads (grouped queries).
        cu_seq_lens_q: int32 `[samples + 1]`, where each sample starts, and the end.

    Returns:
        `[1, tokens, heads, size]` and None for the weights.
    """
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.tensor([0, query.shape[2]], dtype=torch.int32, device=query.device)
        max_length_q = query.shape[2]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    grouped = key.shape[1] != query.shape[1]
    sizes = cu_seq_lens_q.diff().tolist()
    parts = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
        for q, k, v in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2))
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _varlen_kernel(query, key, value, cu_seq_lens, longest: int, scaling: float | None) -> torch.Tensor:
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        if k.shape[1] != q.shape[1]:
            k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
        out = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, is_causal=True, scale=scaling)
    else:
        out = flash_attn_varlen_func(
            q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, softmax_scale=scaling, causal=True
        )
    return out[None]


def _no_mask(*args, **kwargs) -> None:
    """The borders say it all."""


def fill_batches(
    lengths: Sequence[int] | np.ndarray, max_tokens: int, seed: int, window: int = 1000
) -> list[list[int]]:
    """Numbers of samples grouped so that each group has at most `max_tokens` tokens and little room is left.

    Samples are shuffled by `seed` and packed best-fit, longest first, within windows of `window` samples, so that
    groups stay mixed. A sample longer than `max_tokens` is a group of its own.
    """
    lengths = np.asarray(lengths)
    order = np.random.default_rng([seed, len(lengths)]).permutation(len(lengths))
    groups: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        groups.extend(_best_fit(part, lengths, max_tokens))
    return groups


def _best_fit(numbers: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room = np.zeros(0, np.int64)
    for number in numbers:
        need = lengths[number]
        fits = np.flatnonzero(room >= need)
        if len(fits):
            chosen = fits[np.argmin(room[fits])]
            groups[chosen].append(int(number))
            room[chosen] -= need
        else:
            groups.append([int(number)])
            room = np.append(room, max(0, max_tokens - need))
    return groups
