"""Keys and values of all running requests: one row each, kept dense, written in place.

Row r holds positions 0 … length-1 of the request in that row. Rows in use are always the first ones, so a pass
reads slices of the buffers and copies nothing. What lies past a row's length is garbage that a mask hides.
"""

import math
import mmap
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch

_WIDTH_STEP = 64
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, which Python 3.11 doesn't name: addresses beyond the machine's memory are given too."""


class RowCache:
    """Per layer one tensor `[2, rows, kv_heads, width, head_dim]`, made once; `[2]` is keys and values.

    On the CPU its addresses are reserved at once and memory is taken where rows are written, so a row grows without
    being copied. On other devices all of it is taken at the first use.
    """

    room = 64
    """Positions that a row gets beyond its prompt at once; more when it needs them."""

    def __init__(self, num_layers: int, bytes_per_position: int, max_bytes: int, rows: int, width: int):
        """
        Args:
            bytes_per_position: of all layers together.
            max_bytes: of what is written.
            rows, width: how many rows and how many positions of each there can be, at most.
        """
        self.layers: list[torch.Tensor | None] = [None] * num_layers
        self.bytes_per_position = bytes_per_position
        self.max_bytes = max_bytes
        self.rows = rows
        self.max_width = self.width = width
        self.written: list[int] = []
        """Of each row how many positions have taken memory, by this request or by an earlier one."""

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether rows of so many positions fit the memory limit."""
        return len(lengths) <= self.rows and max(lengths) <= self.max_width and self._bytes(lengths) <= self.max_bytes

    def holds_alone(self, length: int) -> bool:
        """A row that runs alone may go beyond the limit."""
        return True

    def prepare(self, lengths: Sequence[int], used_rows: int) -> None:
        """Have room for rows of so many positions; the first `used_rows` rows keep theirs.

        Only if what earlier requests have left behind takes too much memory are rows copied, to give that back.
        """
        self.written = _longer(self.written, lengths)
        if self._bytes(self.written) > max(self.max_bytes, self._bytes(lengths)):
            for index, old in enumerate(self.layers):
                if old is not None:
                    self.layers[index] = new = _zeros(old.shape, old)
                    for row, length in enumerate(lengths[:used_rows]):
                        new[:, row, :, :length] = old[:, row, :, :length]
            self.written = list(lengths)

    def trim(self, rows: int) -> None:
        """Rows from `rows` on aren't used any more; their memory stays for the next ones."""

    def release(self) -> None:
        """Give all memory back; no row may be in use."""
        self.layers = [None] * len(self.layers)
        self.written = []

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of rows to other rows, in every layer."""
        moves = torch.tensor([list(sources), list(targets)])
        for layer in self.layers:
            if layer is not None:
                moves = moves.to(layer.device)  # copied only where the next layer is on another device
                layer[:, moves[1], :, :length] = layer[:, moves[0], :, :length]
        for target in targets:
            self.written = _longer(self.written, [0] * target + [length])

    def load(self, start: int, count: int, states: Sequence[Any], length: int) -> None:
        """Copy `length` positions of `states` (per layer `[2, kv_heads, positions, head_dim]`) to `count` rows."""
        for index, state in enumerate(states):
            layer = self._layer(index, state[0].transpose(0, 1))
            layer[:, start : start + count, :, :length] = state[:, None, :, :length]

    def save(self, row: int, length: int) -> list[torch.Tensor]:
        """A copy of the first `length` positions of a row, per layer `[2, kv_heads, length, head_dim]`."""
        return [layer[:, row, :, :length].clone() for layer in self.layers if layer is not None]

    def write(
        self, index: int, rows: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Write keys and values `[tokens, kv_heads, head_dim]` of a layer where `rows` and `positions` say.

        Returns the layer's whole buffer.
        """
        layer = self._layer(index, keys)
        layer[0][rows, :, positions] = keys
        layer[1][rows, :, positions] = values
        return layer

    def _bytes(self, lengths: Sequence[int]) -> int:
        return sum(map(_whole_steps, lengths)) * self.bytes_per_position

    def _layer(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """The buffer of a layer; `like` is `[tokens, kv_heads, head_dim]`."""
        layer = self.layers[index]
        if layer is None:
            _, heads, head_dim = like.shape
            layer = self.layers[index] = _zeros((2, self.rows, heads, self.width, head_dim), like)
        return layer


class GrowingRowCache(RowCache):
    """A row cache where memory is given only as a whole: rows × the widest of them, copied as it grows."""

    def __init__(self, num_layers: int, bytes_per_position: int, max_bytes: int, max_rows: int, max_width: int):
        super().__init__(num_layers, bytes_per_position, max_bytes, 0, 0)
        self.max_rows, self.max_width = max_rows, max_width

    def holds(self, lengths: Sequence[int]) -> bool:
        rows, width = len(lengths), max(lengths)
        fits = self._area(rows, self._rounded(width)) <= self.max_bytes
        return rows <= self.max_rows and width <= self.max_width and fits

    def prepare(self, lengths: Sequence[int], used_rows: int) -> None:
        rows, width = len(lengths), max(lengths)
        if rows <= self.rows and width <= self.width:
            return
        width = self._rounded(width)
        grown = max(rows, self.rows), max(width, self.width)
        # Within the memory it only grows; beyond it, what is not needed now is given up.
        rows, width = grown if self._area(*grown) <= self.max_bytes else (rows, width)
        # Should memory end on the way, no layer is smaller than this.
        self.rows, self.width = min(rows, self.rows), min(width, self.width)
        for index, old in enumerate(self.layers):
            if old is not None:
                # Layer by layer, so that old and new are never both there as a whole.
                self.layers[index] = _resized(old, rows, width, used_rows)
        self.rows, self.width = rows, width

    def release(self) -> None:
        super().release()
        self.rows = self.width = 0

    def _area(self, rows: int, width: int) -> int:
        return rows * width * self.bytes_per_position

    def _rounded(self, width: int) -> int:
        return min(_whole_steps(width), max(width, self.max_width))


def gives_addresses(size: int) -> bool:
    """Whether the system reserves addresses of so many bytes; one that counts them as memory doesn't."""
    try:
        _mapped(size).close()
    except (OSError, OverflowError):
        return False
    return True


def _whole_steps(length: int) -> int:
    return -(-length // _WIDTH_STEP) * _WIDTH_STEP


def _longer(lengths: Sequence[int], others: Sequence[int]) -> list[int]:
    return [max(pair) for pair in zip_longest(lengths, others, fillvalue=0)]


def _zeros(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Zeros with the dtype and on the device of `like`; on the CPU, memory is taken page by page as it is written.

    Zeros, not empty: a masked position may hold anything but NaN, which no mask can hide.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or not size:
        return like.new_zeros(shape)
    space = _mapped(size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        space.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(space, dtype=like.dtype).view(*shape)


def _mapped(size: int) -> mmap.mmap:
    # Flags that a system doesn't have change only when memory is taken.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, size, **private)


def _resized(old: torch.Tensor, rows: int, width: int, used_rows: int) -> torch.Tensor:
    new = old.new_zeros(2, rows, old.shape[2], width, old.shape[4])
    kept = min(old.shape[3], width)
    new[:, :used_rows, :, :kept] = old[:, :used_rows, :, :kept]
    return new
