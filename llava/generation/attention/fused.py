"""Parts of a decoder layer between its products, each one kernel in Triton in place of several of torch's."""

import torch
import triton
import triton.language as tl

_HEADS = 8
"""Heads that a program turns."""
_COLUMNS = 1024


def put_rotated(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
    pages: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Queries and keys turned by their positions, keys and values put into pages.

    Args:
        projected: `[tokens, heads + 2 kv_heads, head_dim]`, contiguous.
        cos, sin: of each position `[positions, head_dim / 2]`, rows may lie apart.
        positions, slots: int64 `[tokens]`: of each token, and where in the pages it goes.
        pages: `[pages, page, 2, kv_heads, head_dim]`, contiguous.

    Returns the queries `[tokens, heads, head_dim]`.
    """
    tokens, width, size = projected.shape
    kv_heads = pages.shape[3]
    heads = width - 2 * kv_heads
    queries = projected.new_empty(tokens, heads, size)
    _put_rotated[(tokens, triton.cdiv(width, _HEADS))](
        projected, cos, sin, positions, slots, queries, pages, cos.stride(0), HEADS=heads, KV_HEADS=kv_heads, SIZE=size,
        HALF=triton.next_power_of_2(size // 2), BLOCK=_HEADS, num_warps=2,
    )  # fmt: skip
    return queries


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of `[tokens, 2 * inner]`, contiguous."""
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, inner)
    _gated[(tokens, triton.cdiv(inner, _COLUMNS))](gate_up, out, inner, COLUMNS=_COLUMNS)
    return out


def normed(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm of `[tokens, hidden]`, contiguous."""
    out = torch.empty_like(hidden)
    wide = triton.next_power_of_2(hidden.shape[1])
    _normed[(hidden.shape[0],)](
        hidden, weight, out, hidden.shape[1], epsilon, WIDE=wide, num_warps=min(max(wide // 512, 1), 16)
    )
    return out


@triton.jit
def _put_rotated(
    projected, cos, sin, positions, slots, queries, pages, stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, HALF)
    half: tl.constexpr = SIZE // 2
    mask = (head < HEADS + 2 * KV_HEADS)[:, None] & (dims < half)[None, :]
    source = projected + (token * (HEADS + 2 * KV_HEADS) + head[:, None]) * SIZE + dims[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    place = tl.load(positions + token) * stride + dims
    turns = (head < HEADS + KV_HEADS)[:, None]
    c = tl.where(turns, tl.load(cos + place, mask=dims < half, other=0.0).to(tl.float32)[None, :], 1.0)
    s = tl.where(turns, tl.load(sin + place, mask=dims < half, other=0.0).to(tl.float32)[None, :], 0.0)
    left, right = first * c - second * s, second * c + first * s
    is_query = (head < HEADS)[:, None]
    target = queries + (token * HEADS + head[:, None]) * SIZE + dims[None, :]
    tl.store(target, left.to(queries.dtype.element_ty), mask=mask & is_query)
    tl.store(target + half, right.to(queries.dtype.element_ty), mask=mask & is_query)
    kept = pages + (tl.load(slots + token) * (2 * KV_HEADS) + head[:, None] - HEADS) * SIZE + dims[None, :]
    tl.store(kept, left.to(pages.dtype.element_ty), mask=mask & (head >= HEADS)[:, None])
    tl.store(kept + half, right.to(pages.dtype.element_ty), mask=mask & (head >= HEADS)[:, None])


@triton.jit
def _gated(gate_up, out, inner, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < inner
    gate = tl.load(gate_up + token * 2 * inner + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * inner + inner + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * inner + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _normed(hidden, weight, out, size, epsilon, WIDE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    dims = tl.arange(0, WIDE)
    states = tl.load(hidden + start + dims, mask=dims < size, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(states * states) / size + epsilon)
    own = tl.load(weight + dims, mask=dims < size, other=0.0).to(tl.float32)
    tl.store(out + start + dims, (states * scale * own).to(out.dtype.element_ty), mask=dims < size)
