"""A run's surroundings without hardware: process groups of any size, and tensors with shapes but no content."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"
from torch.utils._pytree import tree_map_only

from llava.train.step import gpu
from llava.train.step.hardware import GPUS_PER_MACHINE, Gpu

if importlib.util.find_spec("torch.distributed._meta_registrations") is None:
    import torch.distributed._tools.fake_collectives  # releases whose collectives take no tensors without content

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
              "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "ACCELERATE_TORCH_DEVICE")  # fmt: skip
_LEVELS = {"accelerate": logging.WARNING, "transformers": logging.ERROR, "llava.train.step": logging.WARNING}
"""From which level on these are heard of a run that isn't one."""


@contextmanager
def world(described: Gpu, processes: int, compiler: Callable, rank: int = 0) -> Iterator[FakeTensorMode]:
    """Within, this process is number `rank` of `processes`, each with one GPU as described.

    Collectives take part in nothing and return at once. Gives the mode under which tensors have no content. What
    the Trainer would say of a real run (files saved, weights kept) isn't logged.
    """
    before = {name: os.environ.pop(name, None) for name in _VARIABLES}
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # not "cpu:0", another device to tensors without content
    if processes > 1:  # as torchrun sets them
        own = {"RANK": rank, "LOCAL_RANK": rank % GPUS_PER_MACHINE, "WORLD_SIZE": processes,
               "LOCAL_WORLD_SIZE": min(processes, GPUS_PER_MACHINE), "MASTER_ADDR": "localhost",
               "MASTER_PORT": 29500}  # fmt: skip
        os.environ.update({name: str(value) for name, value in own.items()})
        torch.distributed.init_process_group(
            "fake", store=torch.distributed.HashStore(), rank=rank, world_size=processes
        )
    parallel: Any = nn.parallel
    of_torch, parallel.DistributedDataParallel = parallel.DistributedDataParallel, Replicated
    levels = {name: logging.getLogger(name).level for name in _LEVELS}
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    try:
        with gpu.describe(described, compiler):
            # Counts of samples and the like have content, and mix with tensors that have none.
            yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        parallel.DistributedDataParallel = of_torch
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Replicated(nn.parallel.DistributedDataParallel):
    """torch's DDP, which at its start would compare contents, and whose sums are to be waited for."""

    def __init__(self, module: nn.Module, **options):
        super().__init__(module, init_sync=False, **options)
        self.register_comm_hook(None, _sum_bucket)


def _sum_bucket(_, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    summed: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    torch.distributed.all_reduce(bucket.buffer())
    summed.set_result(bucket.buffer())
    return summed


@contextmanager
def shapes_uncounted(paused: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Within, nothing is counted (`paused`) while sharded tensors work out the shape of an operator's result: they do
    so on whole tensors without content, which a run has no memory of."""
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    work_out = propagator._propagate_tensor_meta_non_cached

    def uncounted(*args):
        with paused():
            return work_out(*args)

    propagator._propagate_tensor_meta_non_cached = uncounted
    try:
        yield
    finally:
        del propagator._propagate_tensor_meta_non_cached


def shard_as_on_gpus(training) -> None:
    """Let accelerate shard although tensors lie on the CPU: it does so for processes that have GPUs."""
    if training.fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def tell_parameters_apart(model: nn.Module) -> None:
    """Give each parameter an address of its own, by which accelerate finds it again in the optimizer once it is
    sharded; without content all lie at the same."""
    for number, parameter in enumerate(model.parameters()):
        parameter.data_ptr = partial(int, number)  # type: ignore[method-assign]


def without_content(mode: FakeTensorMode, batch):
    """The same nested structure with tensors that have shapes alone."""
    return tree_map_only(torch.Tensor, mode.from_tensor, batch)
