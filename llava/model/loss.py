"""The training loss without the whole logits: target positions alone, in chunks that are recomputed backward.

A vocabulary of 32,000 in float32 takes 128 kB per position, and as much again for the gradient; here no more than
one chunk of it exists at a time.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from llava.constants import IGNORE_INDEX

CHUNK_ELEMENTS = 1 << 25
"""Largest block of logits that is held at once: 128 MB in float32."""


def causal_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    vocab_size: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Mean cross entropy of the next token, the same number as over whole float32 logits.

    Args:
        hidden_states: `[batch, positions, hidden]`, the language model's output after its last norm.
        lm_head: from hidden states to logits.
        labels: `[batch, positions]`; position i is predicted from i - 1; IGNORE_INDEX is no target.

    Returns:
        a float32 scalar; zero (with a graph through everything) if there is no target.
    """
    hidden_states = hidden_states[:, :-1]
    labels = labels[:, 1:].to(hidden_states.device)
    is_target = labels != IGNORE_INDEX
    targets = labels[is_target]
    hidden_states = hidden_states[is_target]
    count = targets.shape[0]
    if count == 0:
        # Other processes wait for these gradients: take part with weight zero.
        return (lm_head(hidden_states.new_zeros(1, hidden_states.shape[-1])).float().sum() + hidden_states.sum()) * 0
    rows = max(1, chunk_elements // vocab_size)
    if count <= rows:
        return _sum(hidden_states, targets, lm_head) / count
    parts = [
        checkpoint(_sum, part, part_targets, lm_head, use_reentrant=False)
        for part, part_targets in zip(hidden_states.split(rows), targets.split(rows))
    ]
    return torch.stack(parts).sum() / count


def _sum(hidden_states: torch.Tensor, targets: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
    return cross_entropy(lm_head(hidden_states).float(), targets, reduction="sum")
