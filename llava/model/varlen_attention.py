"""Causal attention over sequences that follow each other, on a GPU: one kernel, whichever is installed.

flash-attn 3 (Hopper), flash-attn 2, or torch's own `varlen_attn`. What a kernel takes (a window, a scale, fewer
heads for keys than for queries) is read from its signature: it changed from release to release.
"""

import importlib
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from llava.errors import LlavaError

logger = logging.getLogger(__name__)

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """`attend(q, k, v, (query borders, key borders), (longest of queries, of keys), scale, window)`, tensors `[tokens,
    heads, size]`, to the same shape as q."""

    attend: Callable[..., torch.Tensor]
    takes_groups: bool
    """Whether keys and values may have fewer heads than queries; else they are repeated."""


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor | None,
    longest: int | None,
    *,
    scale: float | None = None,
    window: int | None = None,
    key_borders: torch.Tensor | None = None,
    longest_keys: int | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Causal attention within sequences; the last query of each sees all of its keys, the one before one less, ….

    Args:
        query: `[tokens, heads, size]`; key and value `[keys, …]` may have fewer heads (grouped queries). Where one of
            the three is in half precision all of them are brought to its dtype.
        borders: int32 `[sequences + 1]`, where the queries of each sequence start, and the end.
        longest: queries of the longest sequence, or more.
        scale: of the scores; None: 1 / sqrt(size).
        window: how many tokens back, itself included, a token sees; None: all.
        key_borders, longest_keys: the same for keys, no fewer in a sequence than queries; None: there are as many.
        kernel: in place of the installed one.

    Returns:
        `[tokens, heads, size]`.

    Raises:
        LlavaError: the borders are missing, or no kernel is installed.
    """
    if borders is None or longest is None:
        raise LlavaError("attention over joined samples needs their borders (cu_seq_lens_q, max_length_q)")
    if key_borders is None or longest_keys is None:
        key_borders, longest_keys = borders, longest
    dtype = next((tensor.dtype for tensor in (value, query, key) if tensor.dtype in HALVES), query.dtype)
    q, k, v = (tensor.to(dtype).contiguous() for tensor in (query, key, value))
    window = None if window is None or window >= longest_keys else window
    kernel = kernel or installed_kernel()
    if k.shape[1] != q.shape[1] and not kernel.takes_groups:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    return kernel.attend(q, k, v, (borders, key_borders), (longest, longest_keys), scale, window)


@cache
def installed_kernel() -> Kernel:
    """The fastest kernel that is installed, said once in the log."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    candidates = [("flash_attn_interface", "flash_attn_varlen_func", flash_kernel)] if hopper else []
    candidates += [
        ("flash_attn", "flash_attn_varlen_func", flash_kernel),
        ("torch.nn.attention.varlen", "varlen_attn", torch_kernel),
    ]
    for module, name, wrap in candidates:
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, OSError):
            continue
        logger.info("attention over joined samples: %s.%s", module, name)
        return wrap(function)
    raise LlavaError("no attention kernel for joined samples: install flash-attn, or torch 2.10 or newer")


def flash_kernel(function: Callable) -> Kernel:
    """flash-attn's `flash_attn_varlen_func`, version 2 or 3, as a `Kernel`."""

    def attend(q, k, v, borders, longest, scale, window):
        out = function(
            q, k, v, *borders, *longest,
            softmax_scale=scale, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0),
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out  # some releases of version 3 give the scores' sums too

    return Kernel(attend, takes_groups=True)


def torch_kernel(function: Callable) -> Kernel:
    """torch's `varlen_attn` as a `Kernel`: causal by `window_size` from 2.11, by `is_causal` before."""
    names = inspect.signature(function).parameters
    has_window, has_scale, has_groups = (name in names for name in ("window_size", "scale", "enable_gqa"))

    def attend(q, k, v, borders, longest, scale, window):
        options: dict = {}
        if has_window:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        elif window is None:
            options["is_causal"] = True
        else:
            raise LlavaError("this release of torch has no sliding window for joined samples; use 2.11 or newer")
        if has_scale:
            options["scale"] = scale
        elif scale is not None:
            q = q * (scale * math.sqrt(q.shape[-1]))
        if has_groups:
            options["enable_gqa"] = k.shape[1] != q.shape[1]
        return function(q, k, v, *borders, *longest, **options)

    return Kernel(attend, has_groups)
