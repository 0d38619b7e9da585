"""Which processes of a sharded run hold other amounts than the first."""

from collections.abc import Iterable

import torch


def unlike_ranks(trained: Iterable[torch.Size], processes: int) -> tuple[tuple[int, ...], ...]:
    """Processes, by number, that get smaller parts of the trained weights than the first, in groups of one size.

    FSDP 2 cuts a weight's rows into as many pieces of one size as there are processes, rounded up, so the last
    processes may get fewer or none. (Memory for weights is that of a whole piece, for gradients and moments it isn't.)

    Args:
        trained: shapes of the weights.
    """
    shapes = list(trained)
    groups: dict[int, list[int]] = {}
    for rank in range(processes):
        groups.setdefault(sum(_numbers(shape, processes, rank) for shape in shapes), []).append(rank)
    return tuple(tuple(ranks) for ranks in groups.values() if 0 not in ranks)


def _numbers(shape: torch.Size, processes: int, rank: int) -> int:
    """Of a weight's numbers that a process holds."""
    rows = shape[0] if len(shape) else 1
    piece = -(-rows // processes)
    held = min(max(rows - rank * piece, 0), piece)
    return held * (shape.numel() // max(rows, 1))
