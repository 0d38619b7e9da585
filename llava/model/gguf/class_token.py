"""A tower with a class token for the llama.cpp of today, which puts that token in the wrong place.

llama.cpp (since May 2025; ggml-org/llama.cpp#25814) appends the class token behind the patches, but adds position
embeddings and takes rows as if it stood before them. Where a token stands means nothing to a transformer but for its
position embedding, so a file whose position table has the class token's last gives the right features, each one row
early: the first patch's is dropped, the class token's comes last. What is left to do is to move every row down by one,
and attention can do that. So the tower is written wider, and with one block more:

- Each head is some values wider. The values that this adds to the hidden state hold the mean of the others, so that a
  layer norm finds the same mean (its weights and epsilon make up for the larger width); in some of them stand, small
  enough to change nothing, the digits of the row's number and those of the row before.
- The added block looks from each row at the row before it: the score is minus the squared distance of the digits, zero
  there and far below elsewhere. Two values of +-16384, which the last block before it adds, make its layer norm a mere
  scaling by a known factor, so that its values are the other row's hidden state.
- The projector is given the state before that block and behind it (`clip.vision.feature_layer`), and subtracts.

Figures and bounds: tests/real/test_gguf.py, which compares with llama.cpp's own library.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch

_BASE = 5
"""Digits from -2 to 2 are exact in half precision, and so are their squares' sums."""
_LARGE = 16384.0
_SMALL = 0.004
"""Of the digits' size to that of a hidden state: 1e-5 of its variance."""
_SCORE = 30.0
"""How far the row before is ahead of all others, at least."""
_DAMPED = 0.125
"""See `Widening._functional`."""
_MULTIPLE = 8
"""Head sizes that fast attention kernels know are multiples of it."""
_UNUSED_FFN = 32

Tensor = tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]


class _Added(NamedTuple):
    """Where each of the added values stands in the hidden state."""

    before: slice
    """The digits of the row before."""
    before_sum: int
    """A quarter of their squares' sum."""
    own: slice
    """The digits of this row."""
    own_sum: int
    """A quarter of their squares' sum."""
    one: int
    mean: int
    """Nothing but the mean, which all others but `zero` hold too."""
    zero: int
    large: slice
    """The two large values that the last block adds."""


@dataclass(frozen=True)
class Widening:
    """How one tower is widened.

    Args:
        hidden, heads, blocks, tokens: of the tower; tokens are the patches and the class token.
        pre_norm: weight and bias of a norm before the first block.
        spread: about the standard deviation of an embedding, float.
    """

    hidden: int
    heads: int
    blocks: int
    tokens: int
    pre_norm: tuple[torch.Tensor, torch.Tensor] | None
    spread: float

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def wide_head(self) -> int:
        wanted = self.head + math.ceil((2 * self.digits + 7) / self.heads)
        return math.ceil(wanted / _MULTIPLE) * _MULTIPLE

    @property
    def width(self) -> int:
        return self.heads * self.wide_head

    @property
    def digits(self) -> int:
        return next(count for count in range(1, 20) if _BASE**count >= self.tokens)

    @cached_property
    def _added(self) -> "_Added":
        start, count = self.hidden, self.digits
        own = start + count + 1
        rest = own + count + 1
        return _Added(
            before=slice(start, start + count),
            before_sum=own - 1,
            own=slice(own, own + count),
            own_sum=rest - 1,
            one=rest,
            mean=rest + 1,
            zero=rest + 2,
            large=slice(rest + 3, rest + 5),
        )

    @cached_property
    def _shrink(self) -> float:
        """The standard deviation over the larger width to that over the tower's own."""
        return math.sqrt(self.hidden / self.width)

    def epsilon(self, own: float) -> float:
        return own * self._shrink**2

    @cached_property
    def _unit(self) -> float:
        """Size of a digit in the first block's input, whose standard deviation is about `spread` or the norm's."""
        if self.pre_norm is None:
            return _SMALL * self.spread
        weight, bias = self.pre_norm
        return _SMALL * math.sqrt(float(weight.square().mean() + bias.square().mean()))

    @cached_property
    def _functional(self) -> torch.Tensor:
        """What of an embedding the added values hold, `[hidden]`: the mean; before a norm, that which this norm makes
        the mean of its own output of, damped so that the norm itself doesn't see it.
        """
        if self.pre_norm is None:
            return torch.full((self.hidden,), 1 / self.hidden)
        weight = self.pre_norm[0]
        return (1 + _DAMPED * (weight - weight.mean())) / self.hidden

    def _with_added(self, values: torch.Tensor, functional: torch.Tensor) -> torch.Tensor:
        """`values` [hidden, ...], and below them `functional` of them, as often as values are added."""
        row = torch.tensordot(functional, values, 1)
        wide = row.expand(self.width, *row.shape).clone()
        wide[: self.hidden] = values
        wide[self._added.zero] = 0
        return wide

    def embedding(self, values: torch.Tensor) -> torch.Tensor:
        """What gives a part of an embedding: `[hidden, ...]` to `[width, ...]`."""
        return self._with_added(values, self._functional)

    def output(self, values: torch.Tensor) -> torch.Tensor:
        """What a block adds to the hidden state: `[hidden, ...]` to `[width, ...]`."""
        return self._with_added(values, torch.full((self.hidden,), 1 / self.hidden))

    def positions(self, table: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` to `[tokens, width]`, with the rows' numbers."""
        wide = self.embedding(table.T).T.contiguous()
        added = self._added
        unit = self._unit * (1 if self.pre_norm is None else _DAMPED * self.spread)
        digits = self._digits(torch.arange(self.tokens)) * unit
        previous = digits.roll(1, 0)
        for place, values in ((added.before, previous), (added.own, digits)):
            wide[:, place] += values
        for column, values in ((added.before_sum, previous), (added.own_sum, digits)):
            wide[:, column] += (values / unit).square().sum(1) / 4 * unit
        wide[:, added.one] += unit
        return wide

    def _digits(self, rows: torch.Tensor) -> torch.Tensor:
        powers = _BASE ** torch.arange(self.digits)
        return (rows[:, None] // powers % _BASE - _BASE // 2).float()

    def norm(self, values: torch.Tensor, leaf: str) -> torch.Tensor:
        """Weight or bias of a block's norm: what is added is left out of its output."""
        wide = torch.zeros(self.width)
        wide[: self.hidden] = values * self._shrink if leaf == "weight" else values
        return wide

    def first_norm(self, values: torch.Tensor, leaf: str) -> torch.Tensor:
        """The same of the norm before the blocks: the added values become its output's mean, and keep the digits."""
        wide = self.norm(values, leaf)
        wide[self.hidden :] = self._shrink / _DAMPED if leaf == "weight" else values.mean()
        wide[self._added.zero] = 0
        return wide

    def large(self, bias: torch.Tensor) -> torch.Tensor:
        """The last block's bias `[width]` with what makes the next norm a scaling."""
        bias[self._added.large] += torch.tensor([_LARGE, -_LARGE])
        return bias

    def rows(self, values: torch.Tensor, part: str) -> torch.Tensor:
        """Query, key or value: `[hidden]` or `[hidden, hidden]` to the larger width, each head filled up with zeros."""
        wide = torch.zeros(self.heads, self.wide_head, *values.shape[1:])
        wide[:, : self.head] = values.reshape(self.heads, self.head, *values.shape[1:])
        if part == "attn_q":  # attention divides by the square root of the head size
            wide *= math.sqrt(self.wide_head / self.head)
        return self.columns(wide.flatten(0, 1)) if values.ndim > 1 else wide.flatten()

    def columns(self, values: torch.Tensor) -> torch.Tensor:
        """`[any, hidden]` to `[any, width]`: nothing is read from what is added."""
        return torch.nn.functional.pad(values, (0, self.width - self.hidden))

    def attention_output(self, values: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(self.hidden, self.heads, self.wide_head)
        wide[:, :, : self.head] = values.reshape(self.hidden, self.heads, self.head)
        return self.output(wide.flatten(1))

    def projector(self, weight: torch.Tensor) -> torch.Tensor:
        """`[out, hidden]` to `[out, 2 * width]`: minus the state before the added block, plus that behind it; what that
        block took its mean from stands where zero was.
        """
        before = self.columns(weight)
        behind = before.clone()
        behind[:, self._added.zero] = -weight.sum(1)
        return torch.cat([-before, behind], 1)

    def added_block(self) -> Iterator[Tensor]:
        """The block that moves rows down by one."""
        width, hidden, added = self.width, self.hidden, self._added
        scale = _LARGE * math.sqrt(2 / width)
        norm = torch.zeros(width)
        norm[:hidden] = norm[added.zero] = scale
        norm[hidden : added.mean + 1] = scale / self._unit
        factor = math.sqrt(_SCORE * math.sqrt(self.wide_head))
        query, key = torch.zeros(2, self.heads, self.wide_head, width)
        digits = range(self.digits)
        for rows, sources in (
            (
                query,
                [*((added.before.start + place, 2.0) for place in digits), (added.one, -4.0), (added.before_sum, -4.0)],
            ),
            (key, [*((added.own.start + place, 1.0) for place in digits), (added.own_sum, 1.0), (added.one, 1.0)]),
        ):
            for row, (source, times) in enumerate(sources):
                rows[:, row, source] = factor * times
                rows[:, row, added.mean] -= factor * times
        value = torch.zeros(width, width)
        value[range(hidden), range(hidden)] = value[hidden, added.zero] = 1
        square, none = (width, width), torch.zeros(width)
        parts = {
            "ln1.weight": norm, "ln1.bias": none, "ln2.weight": none, "ln2.bias": none,
            "attn_q.weight": query.reshape(square), "attn_k.weight": key.reshape(square), "attn_v.weight": value,
            "attn_q.bias": none, "attn_k.bias": none, "attn_v.bias": none, "attn_out.weight": value.T.contiguous(),
            "attn_out.bias": none, "ffn_up.weight": torch.zeros(_UNUSED_FFN, width),
            "ffn_up.bias": torch.zeros(_UNUSED_FFN), "ffn_down.weight": torch.zeros(width, _UNUSED_FFN),
            "ffn_down.bias": none,
        }  # fmt: skip
        for name, tensor in parts.items():
            yield f"v.blk.{self.blocks}.{name}", tuple(tensor.shape), partial(torch.Tensor.clone, tensor)

    def tensors(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Those of the tower and projector, widened, and the added block's."""
        for name, shape, make in tensors:
            yield name, self._shape(name, shape), partial(self._widened, name, make)
        yield from self.added_block()

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name.startswith("mm."):
            return (shape[0], 2 * self.width) if name == "mm.0.weight" else shape
        if name.endswith("ffn_up.bias"):
            return shape
        axes = (0, 1) if re.search(r"attn_\w+\.weight", name) else (1,) if re.search("ffn_up|position", name) else (0,)
        return tuple(self.width if axis in axes else size for axis, size in enumerate(shape))

    def _widened(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        values = make().float()
        part, _, leaf = name.rpartition(".")
        part = part.rpartition(".")[2]
        if name == "mm.0.weight":
            return self.projector(values)
        if name.startswith("mm.") or name.endswith("ffn_up.bias"):
            return values
        if part == "position_embd":
            return self.positions(values)
        if part == "pre_ln":
            return self.first_norm(values, leaf)
        if part in ("ln1", "ln2"):
            return self.norm(values, leaf)
        if part in ("attn_q", "attn_k", "attn_v"):
            return self.rows(values, part)
        if part == "ffn_up":
            return self.columns(values)
        if part in ("attn_out", "ffn_down"):
            wide = self.attention_output(values) if name.endswith("attn_out.weight") else self.output(values)
            return self.large(wide) if name == f"v.blk.{self.blocks - 1}.ffn_down.bias" else wide
        return self.embedding(values)


def spread_of(patches: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor) -> float:
    """About the largest standard deviation over the hidden values that a patch's embedding has: of even patches of the
    corners of the colours and of noise, twice.

    Args:
        patches: the convolution's weights `[hidden, 3, side, side]`.
        other: the position table `[tokens, hidden]`.
    """
    hidden = len(patches)
    corners = torch.cartesian_prod(*3 * [torch.tensor([-2.0, 2.0])])
    even = corners @ patches.float().sum((2, 3)).T
    noise = torch.randn(8, patches[0].numel(), generator=torch.Generator().manual_seed(0))
    found = torch.cat([even, noise @ patches.float().reshape(hidden, -1).T]) + other.float().mean(0)
    if bias is not None:
        found = found + bias.float()
    return 2 * float(found.std(1).max())
