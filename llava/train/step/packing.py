"""Attention for samples joined without padding: each sees itself alone.

Registered with transformers under `packed`; the collator gives the samples' borders (`cu_seq_lens_q`).
On a GPU it is one kernel of variable length (llava.model.varlen_attention); elsewhere samples of about one size are
computed together, padded (llava.train.step.padded_attention). Neither does work between samples, unlike a block mask
over the whole batch.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava.errors import LlavaError
from llava.model.varlen_attention import Kernel, varlen_attention
from llava.train.step import gpu
from llava.train.step.padded_attention import padded_attention, rows

logger = logging.getLogger(__name__)

# transformers makes no mask (and looks at no value) for attention of a name that has no mask function.
NAME = "packed"
CAUSAL = "causal"


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
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
    key_places: torch.Tensor | None = None,
    sliding_window: int | None = None,
    kernel: Kernel | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within sequences: samples, or parts of samples that share their beginning.

    Args:
        query: `[1, heads, tokens, size]`; key and value may have fewer heads (grouped queries).
        cu_seq_lens_q: int32 `[sequences + 1]`, where each sequence starts, and the end.
        max_length_q: tokens of the longest sequence, or more.
        cu_seq_lens_k, max_length_k: the same of what the sequences see; with `key_places` alone they differ.
        key_places: int64 `[keys]`, which tokens the sequences see, one sequence after the other, its own tokens last
            (llava.train.data.shared_images). None: each sees its own.
        sliding_window: how many tokens back, itself included, a token sees; None: all.
        kernel: what computes it on a GPU in half precision; None: the installed one.

    Returns:
        `[1, tokens, heads, size]` and None for the weights.

    Raises:
        LlavaError: the borders are missing.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise LlavaError("packed attention needs the samples' borders (cu_seq_lens_q, max_length_q)")
    if key_places is None:
        cu_seq_lens_k, max_length_k = cu_seq_lens_q, max_length_q
    elif cu_seq_lens_k is None or max_length_k is None:
        raise LlavaError("packed attention needs the borders of what is seen (cu_seq_lens_k, max_length_k)")
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if gpu.takes_kernel(q, k, v):
        if dropout:
            raise LlavaError("attention dropout isn't possible in packed batches on a GPU; set attention_dropout to 0")
        if key_places is not None:
            k, v = rows(k, key_places), rows(v, key_places)
        out = varlen_attention(
            q, k, v, cu_seq_lens_q, max_length_q, scale=scaling,
            window=sliding_window, key_borders=cu_seq_lens_k, longest_keys=max_length_k, kernel=kernel,
        )  # fmt: skip
        return out.unsqueeze(0), None
    out = padded_attention(
        q, k, v, cu_seq_lens_q, cu_seq_lens_k, key_places=key_places, scale=scaling, dropout=dropout,
        window=sliding_window,
    )  # fmt: skip
    return out.unsqueeze(0), None


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
