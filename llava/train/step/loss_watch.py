"""Losses that are no number are found once per log interval, by all processes together, and named by their records.

Looking at every loss would make each micro-batch wait for the GPU.
"""

import math
from collections.abc import Callable, Sequence

import torch

from llava.errors import LlavaError
from llava.train.step.processes import of_all_processes

KEPT = 1000
"""At most this many micro-batches are checked together."""


class LossWatch:
    """The losses since the last look, on their device.

    Args:
        describe: `describe(record number)` names a record in messages.
    """

    def __init__(self, describe: Callable[[int], str]):
        self.describe = describe
        self._losses: list[torch.Tensor] = []
        self._batches: list[tuple[int, Sequence[int]]] = []

    def note(self, loss: torch.Tensor, step: int, numbers: Sequence[int]) -> None:
        """Keep a micro-batch's loss (a scalar tensor), its optimizer step and its records' numbers."""
        self._losses.append(loss.detach())
        self._batches.append((step, numbers))
        if len(self._losses) >= KEPT:
            self.look()

    def look(self) -> None:
        """Wait for the losses, on every process at once.

        Raises:
            LlavaError: one of them, of any process, is no finite number; it names step and records.
        """
        values = torch.stack(self._losses).tolist() if self._losses else []
        bad = [place for place, value in enumerate(values) if not math.isfinite(value)]
        problem = self._problem(values[bad[0]], *self._batches[bad[0]]) if bad else None
        self._losses.clear()
        self._batches.clear()
        problem = first_problem(problem)
        if problem is not None:
            raise LlavaError(problem)

    def _problem(self, loss: float, step: int, numbers: Sequence[int]) -> str:
        names = ", ".join(self.describe(number) for number in numbers)
        return (
            f"the loss is {loss} at step {step}; the batch held: {names}; "
            "try a lower --learning_rate, or --bf16 in place of --fp16"
        )


def first_problem(own: str | None) -> str | None:
    """The problem of the first process that has one, on every process; each must call this."""
    return next((problem for problem in of_all_processes(own) if problem is not None), None)
