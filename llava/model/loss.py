"""The training loss without the whole logits: target positions alone, in chunks that are recomputed backward.

A vocabulary of 32,000 in float32 takes 128 kB per position, and as much again for the gradient; here no more than
one chunk of it exists at a time.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, pad
from torch.utils.checkpoint import checkpoint

from llava.constants import IGNORE_INDEX
from llava.model.products import padded_rows, product

CHUNK_ELEMENTS = 1 << 25
"""Largest block of logits that is held at once: 128 MB in float32."""
ALIGNMENT = 64
"""Columns of a block of logits in half precision are a multiple of this."""


class LanguageHead(nn.Linear):
    """The linear layer from hidden states to logits, that makes the loss too.

    All chunks of a loss are one call of this module: sharded, its weight is gathered once for them and its gradient
    reduced once.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "LanguageHead":
        """The head with the weight of a linear layer (the same parameter)."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor | None = None,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> torch.Tensor:
        """Logits `[..., vocabulary]` of `hidden_states [..., hidden]`.

        With `targets`, int64 `[rows]`, of `hidden_states [rows, hidden]`: the sum of their cross entropies, float32.
        """
        if targets is None:
            return product(self, hidden_states)
        return sum_of_losses(self._aligned(), hidden_states, targets, self.out_features, chunk_elements)

    def _aligned(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The layer; in half precision with a vocabulary filled up to a multiple of 64 by logits of minus infinity,
        which add nothing to a loss: a GPU's matrix products are up to twice as fast in rows of such lengths."""
        missing = -self.out_features % ALIGNMENT
        if not missing or self.weight.dtype == torch.float32:
            return super().forward
        weight = pad(self.weight, (0, 0, 0, missing))
        bias = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
        return partial(linear, weight=weight, bias=pad(bias, (0, missing), value=float("-inf")))


def causal_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    vocab_size: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    target_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross entropy of the next token, the same number as over whole float32 logits.

    Args:
        hidden_states: `[batch, positions, hidden]`, the language model's output after its last norm.
        lm_head: from hidden states to logits.
        labels: `[batch, positions]`; position i is predicted from i - 1; IGNORE_INDEX is no target.
        target_positions: int64 `[targets]`, where targets lie in the flattened labels, none of them first in its
            row. Without it they are looked for, which waits for the GPU.

    Returns:
        a float32 scalar; zero (with a graph through everything) if there is no target.
    """
    labels = labels.to(hidden_states.device)
    if target_positions is None:
        is_target = labels != IGNORE_INDEX
        is_target[:, 0] = False
        target_positions = is_target.flatten().nonzero()[:, 0]
    count = target_positions.shape[0]
    if count == 0:
        # Other processes wait for these gradients: take part with weight zero.
        return (lm_head(hidden_states.new_zeros(1, hidden_states.shape[-1])).float().sum() + hidden_states.sum()) * 0
    targets = labels.flatten().index_select(0, target_positions)
    hidden_states = hidden_states.flatten(0, 1).index_select(0, target_positions - 1)
    if isinstance(lm_head, LanguageHead):
        return lm_head(hidden_states, targets, chunk_elements) / count
    return sum_of_losses(lm_head, hidden_states, targets, vocab_size, chunk_elements) / count


def sum_of_losses(
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Sum of the cross entropies of `targets [rows]` after `hidden_states [rows, hidden]`, a float32 scalar."""
    rows = max(1, chunk_elements // vocab_size)
    if hidden_states.is_cpu and torch.is_autocast_enabled("cpu"):
        # oneDNN keeps megabytes for each new number of rows.
        added = padded_rows(len(targets)) - len(targets)
        hidden_states, targets = pad(hidden_states, (0, 0, 0, added)), pad(targets, (0, added), value=IGNORE_INDEX)
    if targets.shape[0] <= rows:
        return _sum(hidden_states, targets, lm_head)
    parts = [
        checkpoint(_sum, part, part_targets, lm_head, use_reentrant=False)
        for part, part_targets in zip(hidden_states.split(rows), targets.split(rows))
    ]
    return torch.stack(parts).sum()


def _sum(hidden_states: torch.Tensor, targets: torch.Tensor, lm_head: Callable) -> torch.Tensor:
    return cross_entropy(lm_head(hidden_states).float(), targets, reduction="sum")
