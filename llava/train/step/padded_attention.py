"""Attention of packed samples without a kernel for them: short sequences of about one size together, long ones alone.

A call of SDPA for each sequence takes several times as long as its arithmetic where sequences have some tens of tokens,
as the questions of one image have. Those are padded to common sizes and are a few matrix products; nothing is computed
between sequences.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

MOST_SCORES = 48_000
"""Queries times keys of a sequence that is computed with others; from about there on SDPA, which leaves out what isn't
seen and doesn't hold all scores, is faster by itself (on CPUs, 2 to 9 heads of 64)."""
_PADDED_SHARE = 1.5
"""Scores computed together, padding included, for each score that is needed, at most."""
_HIDDEN = -1e30
"""Score of what isn't seen; finite, so that a row of padding, which sees nothing, is no NaN."""


class Bucket(NamedTuple):
    """Sequences computed together: which rows of the queries and which places of the keys they are, int64 `[sequences,
    longest]`, padded with a row of theirs; and what is added to the scores, float32 `[sequences, 1, queries, keys]`
    (None: a long one in which each query sees all keys up to its own)."""

    queries: torch.Tensor
    keys: torch.Tensor
    hidden: torch.Tensor | None


class Layout(NamedTuple):
    """Buckets, and where each query row lies among their outputs, int64 `[tokens]`."""

    buckets: list[Bucket]
    places: torch.Tensor


@torch.compiler.disable
def padded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    key_borders: torch.Tensor,
    *,
    key_places: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within sequences; it reads the borders, which on a CPU lie where no waiting is needed.

    Args:
        query: `[tokens, heads, size]`; key and value may have fewer heads.
        borders, key_borders: of each sequence's queries and of what they see, int32 `[sequences + 1]`.
        key_places: where the keys of the sequences lie, int64 `[keys]`; None: one after the other.
        scale: of the scores; None: 1 / sqrt(size).
        window: how many tokens back, itself included, a token sees; None: all.

    Returns:
        `[tokens, heads, size]`.
    """
    own, seen = (border.diff().tolist() for border in (borders, key_borders))
    alone = [] if key_places is not None else [n for n in range(len(own)) if _is_alone(own[n], seen[n], window)]
    if not alone:
        return _in_buckets(query, key, value, own, seen, key_places, scale, dropout, window)
    parts = [tensor.split(sizes) for tensor, sizes in ((query, own), (key, seen), (value, seen))]
    outputs = {}
    for number in alone:
        q, k, v = (part[number].transpose(0, 1).unsqueeze(0) for part in parts)
        outputs[number] = _by_sdpa(q, k, v, None, scale, dropout).squeeze(0).transpose(0, 1)
    if others := [number for number in range(len(own)) if own[number] and number not in outputs]:
        q, k, v = (torch.cat([part[number] for number in others]) for part in parts)
        sizes, seen_sizes = ([each[number] for number in others] for each in (own, seen))
        out = _in_buckets(q, k, v, sizes, seen_sizes, None, scale, dropout, window)
        outputs |= dict(zip(others, out.split(sizes)))
    return torch.cat([outputs[number] for number in sorted(outputs)])


def _is_alone(queries: int, keys: int, window: int | None) -> bool:
    """Whether SDPA computes a sequence by itself, which needs no table of what is seen."""
    return queries * keys > MOST_SCORES and queries == keys <= (window or keys)


def _in_buckets(query, key, value, own: list[int], seen: list[int], key_places, scale, dropout, window) -> torch.Tensor:
    """`padded_attention` of sequences with so many queries and keys, gathered by size."""
    layout = _layout(tuple(own), tuple(seen), window)
    outputs = []
    for bucket in layout.buckets:
        queries, keys = bucket.queries.to(query.device), bucket.keys.to(query.device)
        hidden = None if bucket.hidden is None else bucket.hidden.to(query.device)
        places = keys if key_places is None else key_places[keys]
        # [sequences, heads, tokens, size]
        q, k, v = (
            rows(tensor, where).transpose(1, 2) for tensor, where in ((query, queries), (key, places), (value, places))
        )
        if hidden is None or queries.shape[1] * keys.shape[1] > MOST_SCORES:
            out = _by_sdpa(q, k, v, hidden, scale, dropout)
        else:
            out = _by_products(q, k, v, hidden, scale, dropout)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return rows(torch.cat(outputs), layout.places.to(query.device))


def rows(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows of `[tokens, heads, size]` at `places`, whose shape takes the place of the first axis.

    The gradients of a row that is taken often are summed in float32, each time in the same order, as an embedding's.
    """
    taken = functional.embedding(places, tensor.flatten(1).float())
    return taken.to(tensor.dtype).unflatten(-1, tensor.shape[1:])


def _by_products(q, k, v, hidden: torch.Tensor, scale: float | None, dropout: float) -> torch.Tensor:
    """Scores, softmax in float32, and the sum of values; key heads' own query heads lie below each other.

    All of it is float32 on the CPU: sizes change from step to step, and bfloat16's products (oneDNN) keep half a
    megabyte for each new size.
    """
    count, heads, length, size = q.shape
    groups = k.shape[1]
    dtype = v.dtype
    scale = scale or size**-0.5
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()
        q = (q * scale).reshape(count * groups, heads // groups * length, size)
        k, v = (tensor.reshape(count * groups, -1, size) for tensor in (k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).float().view(count, heads, length, -1) + hidden
        weights = functional.dropout(torch.softmax(scores, -1), dropout).to(v.dtype)
        out = torch.bmm(weights.view(count * groups, heads // groups * length, -1), v)
    return out.view(count, heads, length, size).to(dtype)


def _by_sdpa(q, k, v, hidden: torch.Tensor | None, scale: float | None, dropout: float) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=None if hidden is None else hidden.to(q.dtype), is_causal=hidden is None, scale=scale,
        dropout_p=dropout, enable_gqa=k.shape[1] != q.shape[1],
    )  # fmt: skip


@lru_cache(maxsize=4)
def _layout(queries: tuple[int, ...], keys: tuple[int, ...], window: int | None) -> Layout:
    """How sequences of so many queries and keys are computed; the layers of a step share it."""
    starts = np.cumsum([0, *queries])
    key_starts = np.cumsum([0, *keys])
    buckets = []
    places = np.empty(starts[-1], np.int64)
    filled = 0
    for members in _alike(queries, keys):
        longest, longest_keys = (max(sizes[each] for each in members) for sizes in (queries, keys))
        own, own_keys = (np.array([sizes[each] for each in members])[:, None] for sizes in (queries, keys))
        rank, key_rank = np.arange(longest), np.arange(longest_keys)
        first, first_key = (begin[members][:, None] for begin in (starts, key_starts))
        # The last query sees all keys of its sequence, the one before it one less.
        last = (own_keys - own + rank)[..., None]
        is_plain = _is_alone(longest, longest_keys, window)
        hidden = None
        if not is_plain:
            sees = (key_rank <= last) & (key_rank < own_keys[..., None]) & (key_rank > last - (window or longest_keys))
            hidden = torch.from_numpy(np.where(sees, np.float32(0), np.float32(_HIDDEN)))[:, None]
        chosen, chosen_keys = np.minimum(rank, own - 1), np.minimum(key_rank, own_keys - 1)
        rows_of, keys_of = torch.from_numpy(first + chosen), torch.from_numpy(first_key + chosen_keys)
        buckets.append(Bucket(rows_of, keys_of, hidden))
        for place, (number, size) in enumerate(zip(members, own[:, 0])):
            begin = filled + place * longest
            places[starts[number] : starts[number] + size] = np.arange(begin, begin + size)
        filled += len(members) * longest
    return Layout(buckets, torch.from_numpy(places))


def _alike(queries: tuple[int, ...], keys: tuple[int, ...]) -> Iterator[list[int]]:
    """Numbers of sequences in lists, each of sequences of about one size; of a long one it is the only one."""
    order = sorted(
        (each for each in range(len(queries)) if queries[each]), key=lambda each: (queries[each], keys[each])
    )
    members: list[int] = []
    needed = longest = longest_keys = 0
    for each in order:
        longest, longest_keys = max(longest, queries[each]), max(longest_keys, keys[each])
        needed += queries[each] * keys[each]
        if members and (
            longest * longest_keys * (len(members) + 1) > _PADDED_SHARE * needed or longest * longest_keys > MOST_SCORES
        ):
            yield members
            members, needed = [], queries[each] * keys[each]
            longest, longest_keys = queries[each], keys[each]
        members.append(each)
    if members:
        yield members
