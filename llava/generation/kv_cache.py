"""Keys and values of all running requests: one row each, kept dense, written in place.

Row r holds positions 0 … length-1 of the request in that row. Rows in use are always the first ones, so a step
reads a slice of the buffers and copies nothing. What lies behind a row's length is garbage that the mask hides.
"""

from collections.abc import Sequence

import torch

_WIDTH_STEP = 64


class RowCache:
    """One tensor `[2, rows, kv_heads, width, head_dim]` per layer, grown as needed; `[2]` is keys and values."""

    def __init__(self, num_layers: int, bytes_per_position: int, max_bytes: int, max_width: int):
        self.layers: list[torch.Tensor | None] = [None] * num_layers
        self.bytes_per_position = bytes_per_position
        """Of all layers together."""
        self.max_bytes = max_bytes
        self.max_width = max_width
        self.rows = self.width = 0

    def fits(self, rows: int, width: int) -> bool:
        """Whether so many rows of so many positions stay within the memory that was granted."""
        return width <= self.max_width and self._bytes(rows, self._rounded(width)) <= self.max_bytes

    def reserve(self, rows: int, width: int, used_rows: int) -> None:
        """Have at least `rows` × `width`; the first `used_rows` rows keep their first `width` positions."""
        if rows <= self.rows and width <= self.width:
            return
        width = self._rounded(width)
        grown = max(rows, self.rows), max(width, self.width)
        # Within the memory it only grows; beyond it, what is not needed now is given up.
        rows, width = grown if self._bytes(*grown) <= self.max_bytes else (rows, width)
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
        """Copy the first `length` positions of rows to other rows."""
        for layer in self.layers:
            if layer is not None:
                layer[:, targets, :, :length] = layer[:, sources, :, :length]

    def load(self, start: int, count: int, states: Sequence[torch.Tensor], length: int) -> None:
        """Copy `length` positions of `states` (per layer `[2, kv_heads, positions, head_dim]`) to `count` rows."""
        for index, state in enumerate(states):
            layer = self._layer(index, state)
            layer[:, start : start + count, :, :length] = state[:, None, :, :length]

    def save(self, row: int, length: int) -> list[torch.Tensor]:
        """A copy of the first `length` positions of a row, per layer `[2, kv_heads, length, head_dim]`."""
        return [layer[:, row, :, :length].clone() for layer in self.layers]

    def write(
        self, index: int, start: int, keys: torch.Tensor, values: torch.Tensor, offset: int | None, positions
    ) -> torch.Tensor:
        """Write `[rows, kv_heads, new, head_dim]` into rows from `start` on; returns these rows, `[2, rows, …]`."""
        layer = self._layer(index, keys)
        rows = layer[:, start : start + keys.shape[0]]
        if offset is not None:
            rows[0, :, :, offset : offset + keys.shape[2]] = keys
            rows[1, :, :, offset : offset + keys.shape[2]] = values
        else:
            places = torch.arange(keys.shape[0], device=keys.device)[:, None]
            rows[0].transpose(1, 2)[places, positions] = keys.transpose(1, 2)
            rows[1].transpose(1, 2)[places, positions] = values.transpose(1, 2)
        return rows

    def _bytes(self, rows: int, width: int) -> int:
        return rows * width * self.bytes_per_position

    def _rounded(self, width: int) -> int:
        return min(-(-width // _WIDTH_STEP) * _WIDTH_STEP, -(-self.max_width // _WIDTH_STEP) * _WIDTH_STEP)

    def _layer(self, index: int, like: torch.Tensor) -> torch.Tensor:
        if self.layers[index] is None:
            heads, head_dim = like.shape[1], like.shape[-1]
            # Zeros, not empty: a masked position may hold anything but NaN, which no mask can hide.
            self.layers[index] = like.new_zeros(2, self.rows, heads, self.width, head_dim)
        return self.layers[index]


def _resized(old: torch.Tensor, rows: int, width: int, used_rows: int) -> torch.Tensor:
    new = old.new_zeros(2, rows, old.shape[2], width, old.shape[4])
    kept = min(old.shape[3], width)
    new[:, :used_rows, :, :kept] = old[:, :used_rows, :, :kept]
    return new


class CachePass:
    """What one forward pass of the model sees of the cache, in the place of transformers' own Cache.

    Rows `start` … `start + count` take new positions: `offset` … for all of them, or where `positions`
    `[count, new]` says; attention reads the first `width` positions.
    """

    def __init__(self, cache: RowCache, start: int, width: int, offset: int | None, positions: torch.Tensor):
        self.cache, self.start, self.width, self.offset = cache, start, width, offset
        self.positions = positions

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_, **__):
        rows = self.cache.write(layer_idx, self.start, keys, values, self.offset, self.positions)
        return rows[0, :, :, : self.width], rows[1, :, :, : self.width]

    def get_seq_length(self, *_) -> int:
        return self.width
