"""Keys and values in pages of a few positions, found through a table: nothing is copied when a row grows.

Row r's positions 0 … length-1 lie in the pages that its table names, in order. A page that several rows begin with is
there once. All memory is taken at the first use; page 0 belongs to nobody, rows that fill up a batch write there.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class KeptPage(NamedTuple):
    """A page of a prompt that was computed before."""

    number: int
    nbytes: int


class KeptPages(list[KeptPage]):
    """The pages of a prompt's beginning; they are free again when this object is gone."""


class PageCache:
    """Per layer one tensor `[pages, page, 2, kv_heads, head_dim]`; `[2]` is keys and values."""

    room = 1
    """Positions that a row gets beyond its prompt at once."""

    def __init__(
        self, num_layers: int, kv_heads: int, bytes_per_position: int, max_bytes: int, max_width: int, page: int = 16
    ):
        self.kv_heads = kv_heads
        self.layers: list[torch.Tensor | None] = [None] * num_layers
        self.page = page
        self.page_bytes = page * bytes_per_position
        self.max_width = max_width
        self.num_pages = max(max_bytes // self.page_bytes, 1)
        """That rows and kept beginnings share; one more belongs to nobody."""
        self.tables: list[list[int]] = []
        """The pages of each row."""
        self.changes = 0
        """How often tables have changed."""
        self._free = list(range(self.num_pages, 0, -1))
        self._users = [0] * (self.num_pages + 1)

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether rows of so many positions fit beside each other, kept beginnings given up."""
        return max(lengths) <= self.max_width and sum(map(self._pages, lengths)) <= self.num_pages

    def holds_alone(self, length: int) -> bool:
        """Whether a row of so many positions fits with no other beside it."""
        return self._pages(length) <= self.num_pages

    def prepare(self, lengths: Sequence[int], used_rows: int) -> None:
        """Have pages for rows of so many positions; the first `used_rows` rows keep theirs, others are empty.

        Raises:
            torch.OutOfMemoryError: there aren't so many.
        """
        self.trim(min(used_rows, len(lengths)))
        self.tables += [[] for _ in range(len(lengths) - len(self.tables))]
        for row, length in enumerate(lengths):
            self.extend(row, length)

    def extend(self, row: int, length: int) -> None:
        """Have pages for `length` positions of a row."""
        for _ in range(self._pages(length) - len(self.tables[row])):
            self.tables[row].append(self._take())
            self.changes += 1

    def trim(self, rows: int) -> None:
        """Give back the pages of all rows but the first `rows`."""
        for table in self.tables[rows:]:
            self._give_back(table)
        del self.tables[rows:]

    def release(self) -> None:
        """Give the rows' pages back."""
        self.trim(0)

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Have rows stand in the places of others, whose pages are given back; `length` is for caches that copy."""
        self.changes += 1
        for source, target in zip(sources, targets, strict=True):
            self._give_back(self.tables[target])
            self.tables[target], self.tables[source] = self.tables[source], []

    def share(self, source: int, target: int, length: int) -> list[tuple[int, int]]:
        """Have `target` begin with `source`'s first `length` positions: whole pages by reference.

        Returns what is to be copied, of a page in part: (from slot, to slot).
        """
        return self._begin(target, self.tables[source][: self._pages(length)], length)

    def load(self, start: int, count: int, states: Sequence[Any], length: int) -> None:
        """Have `count` rows begin with `length` positions of what was kept."""
        numbers = [page.number for page in states[: self._pages(length)]]
        pairs = [pair for row in range(start, start + count) for pair in self._begin(row, numbers, length)]
        for layer in self.layers:
            if layer is not None and pairs:
                copy_slots(layer, torch.tensor(pairs).T.to(layer.device))

    def save(self, row: int, length: int) -> KeptPages:
        """The first `length` positions of a row, by reference: the row goes on writing behind them."""
        numbers = self.tables[row][: self._pages(length)]
        for number in numbers:
            self._users[number] += 1
        kept = KeptPages(KeptPage(number, self.page_bytes) for number in numbers)
        weakref.finalize(kept, self._give_back, numbers)
        return kept

    def layer(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """A layer's whole tensor; at the first use it is made, with the dtype and on the device of `like`."""
        layer = self.layers[index]
        if layer is None:
            # Zeros, not empty: what a mask hides may be anything but NaN.
            shape = (self.num_pages + 1, self.page, 2, self.kv_heads, like.shape[-1])
            layer = self.layers[index] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return layer

    def table(self, rows: Sequence[int], width: int = 0) -> np.ndarray:
        """int32 `[rows, pages]` of the rows' pages, filled up with page 0; at least `width` pages wide."""
        width = max([width, *(len(self.tables[row]) for row in rows)])
        table = np.zeros((len(rows), width), np.int32)
        for line, row in zip(table, rows, strict=True):
            line[: len(self.tables[row])] = self.tables[row]
        return table

    @property
    def pages_in_use(self) -> int:
        return self.num_pages - len(self._free)

    def _begin(self, row: int, pages: Sequence[int], length: int) -> list[tuple[int, int]]:
        self.changes += 1
        whole, rest = divmod(length, self.page)
        self.extend(row, length)
        table = self.tables[row]
        self._give_back(table[:whole])
        table[:whole] = pages[:whole]
        for number in pages[:whole]:
            self._users[number] += 1
        if not rest:
            return []
        return [(pages[whole] * self.page + place, table[whole] * self.page + place) for place in range(rest)]

    def _pages(self, length: int) -> int:
        return -(-length // self.page)

    def _take(self) -> int:
        if not self._free:
            raise torch.OutOfMemoryError("no page of the cache is free")
        number = self._free.pop()
        self._users[number] = 1
        return number

    def _give_back(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._users[number] -= 1
            if not self._users[number]:
                self._free.append(number)


def copy_slots(layer: torch.Tensor, slots: torch.Tensor) -> None:
    """Copy positions of a layer's pages; `slots` int64 `[2, positions]` are from where and to where."""
    flat = layer.flatten(0, 1)
    flat.index_copy_(0, slots.select(0, 1), flat.index_select(0, slots.select(0, 0)))
