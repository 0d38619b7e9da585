"""One forward pass over rows of pages, and the decoding pass, which needs nothing of the host."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch

from llava.generation.attention.kernels import Batch, PagedKernel
from llava.generation.cache.pages import PageCache, copy_slots
from llava.generation.forward_pass import Row, copies_in_order

if TYPE_CHECKING:
    from llava.generation.attention.joined import Rotation
    from llava.model.language_model import Attention


class Layer(Protocol):
    """What a pass asks of the layer that it is in."""

    layer_idx: int


class PagedPass:
    """The indices of one pass over `rows`; a row's source is in this pass or complete in the cache.

    Args:
        cache: has pages for all positions of the rows.
        window: how many positions back each sees; None for all.
    """

    def __init__(
        self, cache: PageCache, kernel: PagedKernel, rows: Sequence[Row], device: torch.device, window: int | None
    ):
        self.cache, self.kernel, self.window = cache, kernel, window
        copies = [
            [pair for one in zip(sources, targets, strict=True) for pair in cache.share(*one, length)]
            for sources, targets, length in copies_in_order(rows)
        ]
        lengths = np.array([row.end - row.begin for row in rows])
        ends = np.cumsum(lengths)
        begins = np.array([row.begin for row in rows])
        positions = np.arange(ends[-1]) + np.repeat(begins - (ends - lengths), lengths)
        table = cache.table([row.row for row in rows])
        of = np.repeat(np.arange(len(rows)), lengths)
        slots = table[of, positions // cache.page].astype(np.int64) * cache.page + positions % cache.page
        used = np.array([row.end for row in rows])
        # One transfer for all.
        parts = [positions, slots, ends - 1, np.concatenate([[0], ends]), used, np.concatenate([[0], np.cumsum(used)])]
        parts += [table.reshape(-1), *(np.array(pairs, np.int64).T.reshape(-1) for pairs in copies)]
        sizes = [part.size for part in parts]
        moved = torch.from_numpy(np.concatenate(parts)).to(device).split(sizes)
        self.positions, self.slots, self.last = moved[:3]
        """Of each token its position, and where it lies in the pages; of each row where its last token stands."""
        starts, used_positions, key_starts = (one.int() for one in moved[3:6])
        self.batch = Batch(moved[6].int().view(table.shape), starts, used_positions, key_starts, int(lengths.max()))
        self.copies = [one.view(2, -1) for one in moved[7:] if one.numel()]

    def to(self, device: torch.device) -> Self:
        """The same pass for layers on another device."""
        moved = copy.copy(self)
        moved.positions, moved.slots, moved.last = (one.to(device) for one in (self.positions, self.slots, self.last))
        table, starts, used, key_starts, longest = self.batch
        moved.batch = Batch(table.to(device), starts.to(device), used.to(device), key_starts.to(device), longest)
        moved.copies = [one.to(device) for one in self.copies]
        return moved

    def attend(
        self, layer: "Layer | Attention", queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Put keys and values into the pages and attend; all `[tokens, heads, head_dim]`.

        Returns `[tokens, heads * head_dim]`.
        """
        pages = self.cache.layer(layer.layer_idx, keys)
        pages.flatten(0, 1).index_copy_(0, self.slots, torch.stack([keys, values], 1))
        return self._attended(pages, queries, scale)

    def attend_projected(
        self, layer: "Layer", projected: torch.Tensor, rotation: "Rotation", scale: float
    ) -> torch.Tensor:
        """As `attend`, of `[tokens, heads + 2 kv_heads, head_dim]` that `rotation` turns."""
        pages = self.cache.layer(layer.layer_idx, projected)
        return self._attended(pages, rotation.put(projected, pages, self.slots), scale)

    def _attended(self, pages: torch.Tensor, queries: torch.Tensor, scale: float) -> torch.Tensor:
        for slots in self.copies:
            copy_slots(pages, slots)
        keys, values = pages.unbind(2)
        return self.kernel.attend(queries, keys, values, self.batch, scale, self.window).flatten(1)


class DecodingPass(PagedPass):
    """A pass of one token for each row, made of what is on the device already.

    Args:
        positions: int64 `[rows]`, of the tokens.
        table: int32 `[rows, pages]`.
        starts: int32 `[rows + 1]`: 0, 1, 2, …
    """

    def __init__(
        self,
        cache: PageCache,
        kernel: PagedKernel,
        positions: torch.Tensor,
        table: torch.Tensor,
        starts: torch.Tensor,
        window: int | None,
    ):
        self.cache, self.kernel, self.window = cache, kernel, window
        self.positions = positions
        page = positions // cache.page
        number = table.gather(1, page.unsqueeze(1)).squeeze(1).long()
        self.slots = number * cache.page + positions % cache.page
        used = (positions + 1).int()
        key_starts = torch.nn.functional.pad(used.cumsum(0, dtype=torch.int32), (1, 0))
        self.batch = Batch(table, starts, used, key_starts, 1)
        self.copies = []
