"""One forward pass over rows of the cache: which tokens go where, and which positions each attends to.

All new tokens of all rows stand in one line, so that no padding goes through the products; attention alone works
on rows, in groups of like length.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from einops import rearrange
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava.generation.cache.rows import RowCache

if TYPE_CHECKING:
    from llava.model.language_model import Attention

ATTENTION = "passes over the cache"
"""Its name in the library's `AttentionInterface`."""

_GROUP_COST = 64
"""Query positions of padding that cost as much as another call of the attention kernel."""
_SETTING = threading.Lock()


class Row(NamedTuple):
    """New positions `begin` … `end` of cache row `row`; the ones before are in it, or copied from row `source`."""

    row: int
    begin: int
    end: int
    source: int | None = None


class Group(NamedTuple):
    """Neighbouring rows whose attention is computed together, padded to `new` queries and `width` keys."""

    tokens: slice
    rows: slice
    shape: tuple[int, int]
    """(rows, new)."""
    width: int
    spread: torch.Tensor | None
    """From the group's tokens to the padded ones; None if nothing is padded."""
    collect: torch.Tensor | None
    """From the padded ones back."""
    mask: torch.Tensor

    def to(self, device: torch.device) -> "Group":
        """The same on another device."""
        spread, collect = (None if one is None else one.to(device) for one in (self.spread, self.collect))
        return self._replace(spread=spread, collect=collect, mask=self.mask.to(device))


class PackedPass:
    """The indices of one pass; `rows` must be neighbours in the cache, in this order.

    A row's source must be among the rows of this pass or complete in the cache; the source of a source comes
    earlier in `rows`.
    """

    def __init__(
        self, cache: RowCache, rows: Sequence[Row], device: torch.device, dtype: torch.dtype, window: int | None
    ):
        self.cache = cache
        self.window = window
        self.dtype = dtype
        lengths = [row.end - row.begin for row in rows]
        ends = np.cumsum(lengths)
        firsts = ends - lengths
        begins = np.array([row.begin for row in rows])
        positions = np.arange(ends[-1]) + np.repeat(begins - firsts, lengths)
        rows_of = np.repeat(np.array([row.row for row in rows]), lengths)
        # Numpy's calls cost less than torch's, and one transfer less than three.
        indices = torch.from_numpy(np.concatenate([positions, rows_of, ends - 1])).to(device)
        self.positions, self.rows, self.last = indices.split([len(positions), len(positions), len(rows)])
        """Of each token its position and its row; of each row where its last token stands in the line."""
        self.groups = [self._group(rows[start:end], int(firsts[start])) for start, end in split_into_groups(lengths)]
        self.copies = [
            (torch.tensor(sources).to(device), torch.tensor(targets).to(device), length)
            for sources, targets, length in copies_in_order(rows)
        ]

    def to(self, device: torch.device) -> Self:
        """The same pass for layers on another device."""
        moved = copy.copy(self)
        moved.positions, moved.rows, moved.last = (one.to(device) for one in (self.positions, self.rows, self.last))
        moved.groups = [group.to(device) for group in self.groups]
        moved.copies = [(sources.to(device), targets.to(device), length) for sources, targets, length in self.copies]
        return moved

    def attend(
        self, attention: "Attention", queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Put keys and values into the cache and attend; all `[tokens, heads, head_dim]`.

        `attention` is the library's module of one block. Returns `[tokens, heads * head_dim]`.
        """
        layer = self.cache.write(attention.layer_idx, self.rows, self.positions, keys, values)
        for sources, targets, length in self.copies:
            layer[:, targets, :, :length] = layer[:, sources, :, :length]
        outputs = []
        for group in self.groups:
            own = queries[group.tokens]
            own = own if group.spread is None else own[group.spread]
            own = rearrange(own, "(row query) head width -> row head query width", row=group.shape[0])
            row_keys, row_values = layer[:, group.rows, :, : group.width]
            output, _ = sdpa_attention_forward(attention, own, row_keys, row_values, group.mask, scaling=scaling)
            output = rearrange(output, "row query head width -> (row query) (head width)")
            outputs.append(output if group.collect is None else output[group.collect])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _group(self, rows: Sequence[Row], first: int) -> Group:
        lengths = [row.end - row.begin for row in rows]
        new, total = max(lengths), sum(lengths)
        width = max(row.end for row in rows)
        tokens = slice(first, first + total)
        queries, spread, collect = self.positions[tokens], None, None
        if total < new * len(rows):
            counts = torch.tensor(lengths)[:, None]
            columns = torch.arange(new)
            # Padding repeats a row's last token; what comes of it is dropped.
            spread = (counts.cumsum(0) - counts + columns.minimum(counts - 1)).flatten().to(queries.device)
            collect = (columns < counts).flatten().nonzero()[:, 0].to(queries.device)
            queries = queries[spread]
        shape = len(rows), new
        mask = self._mask(queries.view(shape), width)
        return Group(tokens, slice(rows[0].row, rows[0].row + len(rows)), shape, width, spread, collect, mask)

    def _mask(self, queries: torch.Tensor, width: int) -> torch.Tensor:
        """`[rows, 1, new, width]` of positions `[rows, new]`: each sees itself and what is before."""
        keys = torch.arange(width, device=queries.device)
        mask = keys <= queries[:, :, None]
        if self.window is not None:
            mask &= keys > queries[:, :, None] - self.window
        mask = mask[:, None]
        if mask.device.type != "cpu":
            return mask
        # torch's kernel for the CPU is faster where it may add its mask.
        return torch.where(mask, 0.0, torch.finfo(self.dtype).min).to(self.dtype)


class WatchedPass(PackedPass):
    """A pass over one row that also notes where its last `count` positions look.

    `weights` float32 `[count, row.end]` are attention's, averaged over heads, summed over the layers so far.
    """

    def __init__(
        self, cache: RowCache, row: Row, count: int, device: torch.device, dtype: torch.dtype, window: int | None
    ):
        super().__init__(cache, [row], device, dtype, window)
        self.count = count
        self.weights = torch.zeros(count, row.end, device=device)

    def to(self, device: torch.device) -> Self:
        moved = super().to(device)
        moved.weights = self.weights.to(device)
        return moved

    def attend(
        self, attention: "Attention", queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        output = super().attend(attention, queries, keys, values, scaling)
        group = self.groups[0]
        mask = group.mask[0, 0, -self.count :]
        layer = self.cache.layers[attention.layer_idx]
        assert layer is not None, "the pass has just written it"
        row_keys = layer[0, group.rows.start, :, : group.width]
        # Key head by key head: all at once would be heads x positions x positions.
        own = rearrange(queries[-self.count :], "query (key group) width -> key group query width", key=len(row_keys))
        for head_queries, head_keys in zip(own, row_keys, strict=True):
            scores = head_queries @ head_keys.T * scaling
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            self.weights += scores.float().softmax(-1).sum(0) / queries.shape[1]
        return output


def _attend(
    module: "Attention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedPass,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What the library's attention calls: `[1, heads, tokens, head_dim]` to `[1, tokens, heads * head_dim]`."""
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    return packed.attend(module, queries, keys, values, scaling)[None], None


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def attention_by_passes(config: PreTrainedConfig) -> Iterator[None]:
    """Within, attention of a model of this config takes `packed`, the pass that it is called in; one thread at a time.

    Outside it attends as before, so that a model in training can answer between two steps.
    """
    with _SETTING:
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before


def split_into_passes(lengths: Sequence[int], max_positions: int) -> Iterator[tuple[int, int]]:
    """Slices of rows, one for each pass of about `max_positions` at most."""
    first, used = 0, 0
    for place, length in enumerate(lengths):
        if place > first and used + length > max_positions:
            yield first, place
            first, used = place, 0
        used += length
    yield first, len(lengths)


def split_into_groups(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Slices of neighbouring rows for which padding and the number of groups together cost least."""
    runs = [0, *(place for place in range(1, len(lengths)) if lengths[place] != lengths[place - 1]), len(lengths)]
    best: list[tuple[int, int]] = [(0, 0)]
    """(cost up to here, where the last group begins), in runs of equal length."""
    for end in range(1, len(runs)):
        longest, options = 0, []
        for start in range(end - 1, -1, -1):
            longest = max(longest, lengths[runs[start]])
            padded = longest * (runs[end] - runs[start])
            options.append((best[start][0] + padded + _GROUP_COST, start))
        best.append(min(options))
    groups, end = [], len(runs) - 1
    while end:
        start = best[end][1]
        groups.append((runs[start], runs[end]))
        end = start
    return groups[::-1]


def copies_in_order(rows: Sequence[Row]) -> list[tuple[list[int], list[int], int]]:
    """(sources, targets, length) in an order in which every source is complete before it is copied."""
    copies: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    depth: dict[int, int] = {}
    for row in rows:
        if row.source is not None:
            depth[row.row] = depth.get(row.source, 0) + 1
            sources, targets = copies.setdefault((depth[row.row], row.begin), ([], []))
            sources.append(row.source)
            targets.append(row.row)
    return [(*copies[key], key[1]) for key in sorted(copies)]
