"""Attention for samples joined without padding: each sees itself alone.

Registered with transformers under `packed`; the collator gives the samples' borders (`cu_seq_lens_q`).
On a GPU it is one kernel of variable length (llava.model.varlen_attention); elsewhere SDPA sample by sample,
which does no work between samples, unlike a block mask over the whole batch.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava.errors import LlavaError
from llava.model.varlen_attention import HALVES, Kernel, varlen_attention
from llava.train.step import gpu

logger = logging.getLogger(__name__)

NAME = "packed"
CAUSAL = "causal"
# transformers makes no mask (and looks at no value) for attention of a name that has no mask function.
FLOAT32_TOKENS = 512
"""Up to so long samples attend in float32 on the CPU. The half-precision kernel's backward pass takes three times as
long for 90 tokens, 1.3 times for 280, and two thirds for 1,024 (measured; 512 lies between)."""


@contextmanager
def training_attention(config, *, packed: bool, longest: int) -> Iterator[None]:
    """Within, a model of this config attends as the collator's batches need it; afterwards as before.

    `longest`: tokens of the longest sample.
    """
    before = config._attn_implementation
    if packed:
        use_packed_attention(config)
    else:
        use_causal_attention(config, longest)
    try:
        yield
    finally:
        config._attn_implementation = before


def use_packed_attention(config, kernel: Kernel | None = None) -> None:
    """Let a model of this config attend within the samples of a packed batch (`kernel`: in place of the installed)."""
    # Chosen here, not in a layer: what is compiled can't look for it.
    kernel = kernel or gpu.attention_kernel()
    if kernel is not None and not kernel.takes_groups and config.num_key_value_heads != config.num_attention_heads:
        times = config.num_attention_heads // config.num_key_value_heads
        logger.warning("this attention kernel doesn't take grouped queries: keys and values are repeated x%d", times)
    AttentionInterface.register(NAME, partial(packed_attention, kernel=kernel))
    config._attn_implementation = NAME


def use_causal_attention(config, longest: int) -> None:
    """Let a model of this config train on batches padded on the right without a mask.

    What is padded comes last, so no real position sees it, and it is no target. Only for SDPA, and where a sliding
    window isn't shorter than `longest`, the longest sample.
    """
    window = getattr(config, "sliding_window", None)
    if config._attn_implementation == "sdpa" and (window is None or window >= longest):
        AttentionInterface.register(CAUSAL, sdpa_attention_forward)
        config._attn_implementation = CAUSAL


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
    sliding_window: int | None = None,
    branches: torch.Tensor | None = None,
    kernel: Kernel | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within samples.

    Args:
        query: `[1, heads, tokens, size]`; key and value may have fewer heads (grouped queries).
        cu_seq_lens_q: int32 `[samples + 1]`, where each sample starts, and the end.
        max_length_q: tokens of the longest sample, or more.
        sliding_window: how many tokens back, itself included, a token sees; None: all.
        branches: int32 `[tokens]`: 0 for tokens that all later ones of their sample see; others are seen by those of
            the same number (llava.train.data.shared_images). None: samples have no branches.
        kernel: what computes it on a GPU in half precision; None: the installed one.

    Returns:
        `[1, tokens, heads, size]` and None for the weights.

    Raises:
        LlavaError: the borders are missing.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise LlavaError("packed attention needs the samples' borders (cu_seq_lens_q, max_length_q)")
    if gpu.is_on_gpu(query.device) and branches is not None:
        # No kernel of variable length knows branches.
        sees = _sees(_sample_numbers(cu_seq_lens_q, query.shape[2]), branches, sliding_window)
        return _masked(query, key, value, sees, scaling, dropout).transpose(1, 2), None
    if gpu.takes_kernel(query, key, value):
        if dropout:
            raise LlavaError("attention dropout isn't possible in packed batches on a GPU; set attention_dropout to 0")
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        out = varlen_attention(
            q, k, v, cu_seq_lens_q, max_length_q, scale=scaling, window=sliding_window, kernel=kernel
        )
        return out.unsqueeze(0), None
    return _sample_by_sample(query, key, value, cu_seq_lens_q, branches, scaling, dropout, sliding_window), None


@torch.compiler.disable
def _sample_by_sample(query, key, value, borders, branches, scale: float | None, dropout: float, window: int | None):
    """`packed_attention` by SDPA; it reads the borders, which lie where no waiting is needed: on the CPU."""
    sizes = borders.diff().tolist()
    dtype = query.dtype
    if dtype in HALVES and max(sizes) <= FLOAT32_TOKENS:
        query, key, value = query.float(), key.float(), value.float()
    apart = borders.new_zeros(query.shape[2]) if branches is None else branches
    parts = []
    for q, k, v, own in zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), apart.split(sizes)):
        plain = branches is None and (window is None or window >= len(own))
        sees = None if plain else _sees(torch.zeros_like(own), own, window)
        parts.append(_masked(q, k, v, sees, scale, dropout))
    return torch.cat(parts, dim=2).transpose(1, 2).to(dtype)


def _masked(query, key, value, sees: torch.Tensor | None, scale: float | None, dropout: float) -> torch.Tensor:
    """SDPA where a token sees what `sees`, bool `[tokens, tokens]`, says; None: all before it."""
    return scaled_dot_product_attention(
        query, key, value, attn_mask=sees, is_causal=sees is None, scale=scale, dropout_p=dropout,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip


def _sees(samples: torch.Tensor, branches: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool `[tokens, tokens]`, True where a token sees another, by their samples' and branches' numbers, [tokens]."""
    sees = (branches == 0) | (branches == branches[:, None])
    sees &= samples == samples[:, None]
    sees = sees.tril()
    if window is None or window >= len(sees):
        return sees
    return sees & (sees.flip(1).cumsum(1).flip(1) <= window)  # of what it sees, the last


def _sample_numbers(borders: torch.Tensor, tokens: int) -> torch.Tensor:
    """Of each token the number of its sample, int64 `[tokens]`."""
    return torch.bucketize(torch.arange(tokens, device=borders.device), borders[1:], right=True)


def fill_batches(
    lengths: Sequence[int] | np.ndarray, max_tokens: int, seed: int, window: int = 1000
) -> list[list[int]]:
    """Numbers of samples grouped so that each group has at most `max_tokens` tokens and few of them are left free.

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
    free = np.zeros(0, np.int64)
    for number in numbers:
        need = lengths[number]
        fits = np.flatnonzero(free >= need)
        if len(fits):
            chosen = fits[np.argmin(free[fits])]
            groups[chosen].append(int(number))
            free[chosen] -= need
        else:
            groups.append([int(number)])
            free = np.append(free, max(0, max_tokens - need))
    return groups
