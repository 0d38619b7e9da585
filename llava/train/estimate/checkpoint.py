"""What writing a checkpoint takes of the GPU's memory, of the host's and of the disk. Nothing is written."""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from llava.train.estimate.costs import size_of
from llava.train.estimate.tracker import Tracker, held


@dataclass
class Checkpoint:
    """What one takes, in bytes.

    Attributes:
        peak: of the GPU's memory, while it is written.
        host: most that lies in the host's memory at once to be written.
        disk: all that is written, by all processes.
    """

    peak: int = 0
    host: int = 0
    disk: int = 0

    def add(self, state: Any, processes: int, left_out: Container[str] = ()) -> None:
        """Count a file that would be written of `state`, without what is `left_out` of it by name; of sharded tensors
        every process writes its own part."""
        tensors = _tensors(state)
        self.host = max(self.host, sum(_bytes(one) for one in tensors if one.device.type == "meta"))
        if left_out:
            tensors = _tensors({name: one for name, one in state.items() if name not in left_out})
        self.disk += sum(_bytes(one) * (processes if isinstance(one, DTensor) else 1) for one in tensors)


@contextmanager
def written_nowhere(found: Checkpoint, tracker: Tracker, processes: int) -> Iterator[None]:
    """Within, what would be written is counted into `found`, and what is copied to the host leaves the GPU's memory."""
    memory = tracker.memory
    before = memory.peak, memory.at_peak

    def count(state=None, *args, state_dict=None, **kwargs) -> None:
        found.add(state if state_dict is None else state_dict, processes)

    writers: tuple[Any, Any] = (torch, torch.distributed.checkpoint)
    own = [module.save for module in writers]
    for module in writers:
        module.save = count
    memory.restart()
    try:
        with _CopiesToHost(tracker):
            yield
    finally:
        for module, save in zip(writers, own):
            module.save = save
    found.peak = memory.peak
    if before[0] > memory.peak:
        memory.peak, memory.at_peak = before


class _CopiesToHost(TorchFunctionMode):
    """Tensors of the GPU lie on the CPU here (llava.train.step.gpu), so copies of them on the host are on "meta"."""

    def __init__(self, tracker: Tracker):
        super().__init__()
        self.tracker = tracker

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = function is torch.Tensor.cpu or (
            function is torch.Tensor.to and any(str(one) == "cpu" for one in (*args[1:], *kwargs.values()))
        )
        if not to_host or isinstance(args[0], DTensor) or args[0].dim() == 0:
            return function(*args, **kwargs)
        with self.tracker.paused():
            return torch.empty_like(args[0], device="meta")


def _tensors(state: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(state) if isinstance(one, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    if tensor.device.type == "meta":
        return tensor.numel() * tensor.element_size()
    return sum(size_of(part) for part in held(tensor))
