"""Keys and values of all running requests: one row each, kept dense, written in place.

Row r holds positions 0 … length-1 of the request in that row. Rows in use are always the first ones, so a pass
reads slices of the buffers and copies nothing. What lies past a row's length is garbage that a mask hides.
"""

from collections.abc import Sequence
from typing import Any

import torch

_WIDTH_STEP = 64


class RowCache:
    """One tensor `[2, rows, kv_heads, width, head_dim]` per layer, grown as needed; `[2]` is keys and values."""

    room = 64
    """Positions that a row gets beyond its prompt at once; more when it needs them."""

    def __init__(self, num_layers: int, bytes_per_position: int, max_bytes: int, max_width: int):
        self.layers: list[torch.Tensor | None] = [None] * num_layers
        self.bytes_per_position = bytes_per_position
        """Of all layers together."""
        self.max_bytes = max_bytes
        self.max_width = max_width
        self.rows = self.width = 0

    def fits(self, rows: int, width: int) -> bool:
        """Whether `rows` of `width` positions fit the memory limit."""
        return width <= self.max_width and self._bytes(rows, self._rounded(width)) <= self.max_bytes

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether rows of so many positions fit the memory limit."""
        return self.fits(len(lengths), max(lengths))

    def prepare(self, lengths: Sequence[int], used_rows: int) -> None:
        """Have room for rows of so many positions; the first `used_rows` rows keep theirs."""
        self.reserve(len(lengths), max(lengths), used_rows)

    def trim(self, rows: int) -> None:
        """Rows from `rows` on aren't used any more; their memory stays for the next ones."""

    def reserve(self, rows: int, width: int, used_rows: int) -> None:
        """Have at least `rows` × `width`; the first `used_rows` rows keep their first `width` positions."""
        if rows <= self.rows and width <= self.width:
            return
        width = self._rounded(width)
        grown = max(rows, self.rows), max(width, self.width)
        # Within the memory it only grows; beyond it, what is not needed now is given up.
        rows, width = grown if self._bytes(*grown) <= self.max_bytes else (rows, width)
        # Should memory end on the way, no layer is smaller than this.
        self.rows, self.width = min(rows, self.rows), min(width, self.width)
        for index, old in enumerate(self.layers):
            if old is not None:
                # Layer by layer, so that old and new are never both there as a whole.
                self.layers[index] = _resized(old, rows, width, used_rows)
        self.rows, self.width = rows, width

    def release(self) -> None:
        """Give all memory back; no row may be in use."""
        self.layers = [None] * len(self.layers)
        self.rows = self.width = 0

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of rows to other rows, in every layer."""
        moves = torch.tensor([list(sources), list(targets)])
        for layer in self.layers:
            if layer is not None:
                moves = moves.to(layer.device)  # copied only where the next layer is on another device
                layer[:, moves[1], :, :length] = layer[:, moves[0], :, :length]

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

    def _bytes(self, rows: int, width: int) -> int:
        return rows * width * self.bytes_per_position

    def _rounded(self, width: int) -> int:
        return min(-(-width // _WIDTH_STEP) * _WIDTH_STEP, max(width, self.max_width))

    def _layer(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """The buffer of a layer; `like` is `[tokens, kv_heads, head_dim]`."""
        layer = self.layers[index]
        if layer is None:
            _, heads, head_dim = like.shape
            # Zeros, not empty: a masked position may hold anything but NaN, which no mask can hide.
            layer = self.layers[index] = like.new_zeros(2, self.rows, heads, self.width, head_dim)
        return layer


def _resized(old: torch.Tensor, rows: int, width: int, used_rows: int) -> torch.Tensor:
    new = old.new_zeros(2, rows, old.shape[2], width, old.shape[4])
    kept = min(old.shape[3], width)
    new[:, :used_rows, :, :kept] = old[:, :used_rows, :, :kept]
    return new
