"""Attention through a table of pages, written in Triton: for GPUs on which no library's kernel takes pages.

One kernel for prompts and for decoding. Each program has a block of one row's queries and the heads that share keys; it
walks over the row's pages with the running maximum and sum of softmax (Dao et al. 2022, algorithm 1). In decoding the
keys are also divided among several programs, so that few rows fill a GPU, and a second kernel puts their parts together
(Dao et al. 2023, "Flash-Decoding").
"""

import math

import torch
import triton
import triton.language as tl

from llava.generation.attention.kernels import Batch

_KEYS = 64
"""Keys that a program reads at a time."""
_PROGRAMS = 512
"""With fewer programs than this, the keys of a row are divided."""
_MOST_PARTS = 32
_WARPS, _STAGES = 4, 2
"""Of 12 choices (32 to 128 keys, 2 to 8 warps, 2 to 4 stages) the one that is never far from the best on an H100."""


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, scale: float, window: int | None
) -> torch.Tensor:
    """As `PagedKernel.attend`."""
    rows, pages = batch.table.shape
    heads, size = queries.shape[1:]
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    lines = 16 if batch.longest * group <= 16 else max(64, triton.next_power_of_2(group))
    blocks = triton.cdiv(batch.longest, lines // group)
    parts = 1
    if batch.longest == 1:
        most = triton.cdiv(pages * keys.shape[1], _KEYS)
        parts = max(1, min(triton.cdiv(_PROGRAMS, rows * kv_heads), most, _MOST_PARTS))
    out = queries.new_empty(queries.shape)
    # Where the keys are divided: each part's weighted mean of values, and the logarithm of its weight.
    partial, weights = out, out
    if parts > 1:
        partial = queries.new_empty((parts, *queries.shape), dtype=torch.float32)
        weights = queries.new_empty((parts, *queries.shape[:2]), dtype=torch.float32)
    wide = max(16, triton.next_power_of_2(size))
    _attend[(rows * blocks, kv_heads, parts)](
        queries, keys, values, batch.table, batch.starts, batch.used, partial, weights,
        scale * math.log2(math.e), blocks, *queries.stride()[:2], *keys.stride()[:3], batch.table.stride(0),
        queries.shape[0], window or 0,
        GROUP=group, SIZE=size, WIDE=wide, PAGE=keys.shape[1], LINES=lines, KEYS=_KEYS, PARTS=parts,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    if parts > 1:
        _join[(queries.shape[0], heads)](partial, weights, out, queries.shape[0], SIZE=size, WIDE=wide, PARTS=parts)
    return out


@triton.jit(do_not_specialize=["blocks", "table_stride", "tokens", "window"])
def _attend(
    queries, keys, values, table, starts, used, partial, weights,
    scale, blocks, query_stride, query_head_stride, page_stride, slot_stride, head_stride, table_stride, tokens, window,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, LINES: tl.constexpr,
    KEYS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A line is one query of one head: `LINES // GROUP` queries of each of the `GROUP` heads that share keys."""
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    kv_head, part = tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + row)
    count = tl.load(starts + row + 1) - first
    own: tl.constexpr = LINES // GROUP
    if block * own >= count:
        return
    length = tl.load(used + row)
    line = tl.arange(0, LINES)
    query = block * own + line // GROUP
    is_line = (line < own * GROUP) & (query < count)
    position = length - count + query
    head = kv_head * GROUP + line % GROUP
    dims = tl.arange(0, WIDE)
    is_dim = dims < SIZE
    source = (first + query).to(tl.int64) * query_stride + head * query_head_stride
    asked = tl.load(queries + source[:, None] + dims[None, :], mask=is_line[:, None] & is_dim[None, :], other=0.0)

    begin = 0
    if window > 0:
        begin = tl.maximum(length - count + block * own - window + 1, 0) // KEYS * KEYS
    end = tl.minimum(length, length - count + (block + 1) * own)
    share = tl.cdiv(tl.cdiv(end - begin, KEYS), PARTS) * KEYS
    begin += part * share
    end = tl.minimum(end, begin + share)
    most = tl.full([LINES], -float("inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    mean = tl.zeros([LINES, WIDE], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = key < end
        page = tl.load(table + row * table_stride + key // PAGE, mask=is_key, other=0).to(tl.int64)
        spot = page * page_stride + key % PAGE * slot_stride + kv_head * head_stride
        mask = is_key[:, None] & is_dim[None, :]
        known = tl.load(keys + spot[:, None] + dims[None, :], mask=mask, other=0.0)
        seen = tl.load(values + spot[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(asked, tl.trans(known), input_precision="ieee") * scale
        sees = is_key[None, :] & (key[None, :] <= position[:, None])
        if window > 0:
            sees = sees & (key[None, :] > position[:, None] - window)
        scores = tl.where(sees, scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(highest == -float("inf"), 0.0, highest)
        shares = tl.exp2(scores - base[:, None])
        fade = tl.exp2(most - base)
        total = total * fade + tl.sum(shares, 1)
        mean = mean * fade[:, None] + tl.dot(shares.to(seen.dtype), seen, input_precision="ieee")
        most = highest
    is_any = total > 0
    total = tl.where(is_any, total, 1.0)
    mean = mean / total[:, None]
    place = (part * tokens + first + query).to(tl.int64) * (tl.num_programs(1) * GROUP) + head
    if PARTS > 1:
        tl.store(weights + place, tl.where(is_any, tl.log2(total) + most, -float("inf")), mask=is_line)
    offsets = place[:, None] * SIZE + dims[None, :]
    tl.store(partial + offsets, mean.to(partial.dtype.element_ty), mask=is_line[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _join(partial, weights, out, tokens, SIZE: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):
    """The parts of one query of one head, each with its share of the whole weight."""
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    step = tokens.to(tl.int64) * tl.num_programs(1)
    dims = tl.arange(0, WIDE)
    most = tl.full([], -float("inf"), tl.float32)
    for part in range(PARTS):
        most = tl.maximum(most, tl.load(weights + part * step + place))
    total = tl.zeros([], tl.float32)
    mean = tl.zeros([WIDE], tl.float32)
    for part in range(PARTS):
        share = tl.exp2(tl.load(weights + part * step + place) - most)
        total += share
        mean += share * tl.load(partial + (part * step + place) * SIZE + dims, mask=dims < SIZE, other=0.0)
    tl.store(out + place * SIZE + dims, (mean / total).to(out.dtype.element_ty), mask=dims < SIZE)
