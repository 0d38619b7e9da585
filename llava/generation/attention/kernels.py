"""Attention through a table of pages: flash-attn's kernels or torch's, whichever works here, else the pages gathered.

What a kernel takes is read from its signature, and whether it works is tried: torch's `varlen_attn` names pages in its
signature from 2.12 on, but takes them only where FlashAttention 3 is installed and switched on.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch.nn.functional import scaled_dot_product_attention

from llava.errors import LlavaError, library_errors

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Which queries and keys belong together, on the device."""

    table: torch.Tensor
    """int32 `[rows, pages]`."""
    starts: torch.Tensor
    """int32 `[rows + 1]`: where each row's queries begin in the line of all, and the end."""
    used: torch.Tensor
    """int32 `[rows]`: positions of each row, those of its queries included, which are the last ones."""
    key_starts: torch.Tensor
    """int32 `[rows + 1]`: sums of `used`."""
    longest: int
    """Queries of a row, at most."""


class PagedKernel(NamedTuple):
    """`attend(queries, keys, values, batch, scale, window)`, to `[tokens, heads, head_dim]` as the queries'."""

    name: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Batch, float, int | None], torch.Tensor]
    page: int
    """Positions of a page."""


def gathered(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, scale: float, window: int | None
) -> torch.Tensor:
    """By torch's scaled_dot_product_attention over copies of the pages, rows padded to the longest."""
    rows = batch.table.shape[0]
    places = torch.arange(queries.shape[0], device=queries.device)
    row_of = torch.searchsorted(batch.starts.narrow(0, 1, rows), places.int(), right=True)
    column = places - batch.starts.index_select(0, row_of)
    slot = row_of * batch.longest + column
    padded = queries.new_zeros(rows * batch.longest, *queries.shape[1:]).index_copy_(0, slot, queries)
    padded = rearrange(padded, "(row query) head width -> row head query width", row=rows)
    row_keys, row_values = (
        rearrange(
            states.index_select(0, batch.table.flatten()),
            "(row page) place head width -> row head (page place) width",
            row=rows,
        )
        for states in (keys, values)
    )
    new = batch.starts.diff()
    position = (batch.used - new).unsqueeze(1) + torch.arange(batch.longest, device=queries.device)
    key = torch.arange(row_keys.shape[2], device=queries.device)
    mask = key <= position.unsqueeze(2)
    if window is not None:
        mask &= key > position.unsqueeze(2) - window
    out = scaled_dot_product_attention(
        padded, row_keys, row_values, mask.unsqueeze(1), scale=scale, enable_gqa=padded.shape[1] != row_keys.shape[1]
    )
    return rearrange(out, "row head query width -> (row query) head width").index_select(0, slot)


GATHERED = PagedKernel("pages gathered for scaled_dot_product_attention", gathered, 16)


def torch_kernel(function: Callable[..., Any]) -> PagedKernel | None:
    """torch's `varlen_attn`, if its signature has pages."""
    if not {"seqused_k", "block_table"} <= inspect.signature(function).parameters.keys():
        return None

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, scale: float, window: int | None
    ) -> Any:
        capacity = batch.table.shape[1] * keys.shape[1]
        return function(
            queries, keys, values, batch.starts, None, batch.longest, capacity, scale=scale, seqused_k=batch.used,
            window_size=(-1 if window is None else window - 1, 0), block_table=batch.table,
            enable_gqa=queries.shape[1] != keys.shape[2],
        )  # fmt: skip

    return PagedKernel("torch.nn.attention.varlen.varlen_attn", attend, 16)


def flash_2_kernel(function: Callable[..., Any]) -> PagedKernel | None:
    """flash-attn 2's `flash_attn_varlen_func`, whose pages have 256 positions."""
    if "block_table" not in inspect.signature(function).parameters:
        return None

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, scale: float, window: int | None
    ) -> Any:
        capacity = batch.table.shape[1] * keys.shape[1]
        return function(
            queries, keys, values, batch.starts, batch.key_starts, batch.longest, capacity, softmax_scale=scale,
            causal=True, window_size=(-1, -1) if window is None else (window - 1, 0), block_table=batch.table,
        )  # fmt: skip

    return PagedKernel("flash_attn.flash_attn_varlen_func", attend, 256)


def flash_3_kernel(function: Callable[..., Any]) -> PagedKernel | None:
    """flash-attn 3's `flash_attn_with_kvcache`."""
    if not {"page_table", "cu_seqlens_q"} <= inspect.signature(function).parameters.keys():
        return None

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, scale: float, window: int | None
    ) -> Any:
        return function(
            queries, keys, values, cache_seqlens=batch.used, page_table=batch.table, cu_seqlens_q=batch.starts,
            max_seqlen_q=batch.longest, softmax_scale=scale, causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )  # fmt: skip

    return PagedKernel("flash_attn_interface.flash_attn_with_kvcache", attend, 16)


def triton_kernel(function: Callable[..., Any]) -> PagedKernel:
    """This project's own, which runs wherever Triton does."""
    return PagedKernel("llava.generation.attention.triton_kernel", function, 16)


CANDIDATES = (
    ("flash_attn_interface", "flash_attn_with_kvcache", flash_3_kernel),
    ("torch.nn.attention.varlen", "varlen_attn", torch_kernel),
    ("flash_attn", "flash_attn_varlen_func", flash_2_kernel),
    ("llava.generation.attention.triton_kernel", "attend", triton_kernel),
)


def signatures() -> Iterator[PagedKernel]:
    """The installed kernels that name pages in their signature, the fastest first."""
    for module, name, wrap in CANDIDATES:
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, OSError):
            continue
        kernel = wrap(function)
        if kernel is not None:
            yield kernel


def working_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> PagedKernel:
    """The first kernel that attends on this device in this dtype, said in the log; else pages are gathered."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        for kernel in signatures():
            try:
                # Triton has errors of its own kind, and those of the C compiler that it calls.
                with library_errors(f"{kernel.name} takes no pages here"):
                    _try(kernel, device, dtype, heads, kv_heads, size)
            except LlavaError as error:
                log.info("%s", error)
            else:
                log.info("attention over pages: %s", kernel.name)
                return kernel
    log.info("attention over pages: %s", GATHERED.name)
    return GATHERED


def working_fused(device: torch.device) -> Any:
    """The module `llava.generation.attention.fused` where its kernels run, else None."""
    if device.type != "cuda":
        return None
    try:
        with library_errors("no kernels of Triton here"):
            fused = importlib.import_module("llava.generation.attention.fused")
            fused.gated(torch.ones(2, 16, device=device))
    except LlavaError as error:
        log.info("%s", error)
        return None
    return fused


def _try(kernel: PagedKernel, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> None:
    """Attend over two rows of one query.

    Raises:
        RuntimeError: what comes out isn't what attention over gathered pages gives.
    """
    random = torch.Generator().manual_seed(0)
    shapes = (2, heads, size), (4, kernel.page, 2, kv_heads, size)
    queries, pages = (torch.randn(shape, generator=random).to(device, dtype) for shape in shapes)
    keys, values = pages.unbind(2)
    table = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32).to(device)
    used = torch.tensor([kernel.page + 1, 3], dtype=torch.int32).to(device)
    starts = torch.arange(3, dtype=torch.int32).to(device)
    batch = Batch(table, starts, used, torch.tensor([0, kernel.page + 1, kernel.page + 4]).int().to(device), 1)
    found, expected = (one(queries, keys, values, batch, size**-0.5, None) for one in (kernel.attend, gathered))
    if (found.float() - expected.float()).abs().max().item() > 0.05:
        raise RuntimeError("its result differs from that over gathered pages")
