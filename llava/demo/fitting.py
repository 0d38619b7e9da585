"""What the two makers of base models share: optimizers, the schedule, the loop with its bar, several processes.

Processes of one thread each, with a part of every batch, are faster here than threads of one process: the
operations are too small to be divided.
"""

import math
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from llava.bars import tqdm
from llava.commandline import EXIT_BAD_INPUT
from llava.demo.muon import Muon
from llava.errors import LlavaError, amount
from llava.records import write_json

LOSSES = "losses.json"


def fit(
    model: nn.Module,
    batches: Iterator,
    loss_of: Callable[..., torch.Tensor],
    *,
    steps: int,
    lr: float,
    matrix_lr: float,
    hidden: Callable[[str], bool],
    name: str,
    folder: Path,
) -> None:
    """Train `model` in place and write its losses to `folder`.

    Args:
        loss_of: `loss_of(batch)` of the model's current weights.
        lr: of AdamW, for embeddings, norms, biases and heads.
        matrix_lr: of Muon, for the matrices whose name `hidden` accepts.
    """
    named = list(model.named_parameters())
    matrices = [parameter for key, parameter in named if parameter.ndim == 2 and hidden(key)]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for _, parameter in named if id(parameter) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True), Muon(matrices, matrix_lr)]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps)) for optimizer in optimizers
    ]
    losses: list[float] = []
    first = is_first()
    model.train()
    bar = tqdm(range(steps), desc=name, unit="step", mininterval=0.5, disable=not first)
    for _ in bar:
        loss = loss_of(next(batches))
        model.zero_grad(set_to_none=True)
        loss.backward()
        _share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        losses.append(round(loss.item(), 4))
        bar.set_postfix(loss=losses[-1], refresh=False)
    model.eval()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / LOSSES, losses, indent=None)


def in_processes(function: Callable[..., None], args, count: int) -> None:
    """Call `function(args)` in `count` processes of one thread that form a group; in this one if `count` is 1.

    Raises:
        LlavaError: that of a process, in its words.
    """
    if count < 1:
        raise LlavaError(f"--processes {count}: give 1 or more")
    if count == 1:
        _start(0, function, args, 1, 0, None)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    complaints = torch.multiprocessing.get_context("spawn").SimpleQueue()
    try:
        torch.multiprocessing.spawn(_start, (function, args, count, port, complaints), nprocs=count)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code != EXIT_BAD_INPUT:
            raise
        raise LlavaError(complaints.get()) from None


def process_number() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes the results."""
    return process_number() == 0


def _start(rank: int, function: Callable[..., None], args, count: int, port: int, complaints: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if count > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    try:
        function(args)
    except LlavaError as error:
        if complaints is None:
            raise
        complaints.put(str(error))
        sys.exit(EXIT_BAD_INPUT)
    finally:
        if count > 1:
            dist.destroy_process_group()


def _share_gradients(model: nn.Module) -> None:
    """The mean of all processes' gradients, in one message."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def warm_cosine(step: int, steps: int) -> float:
    """Share of the highest rate: up over the first twentieth (60 steps at most), down along a cosine."""
    warm = max(1, min(60, steps // 20))
    return min(1.0, (step + 1) / warm) * (0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.01)


def own_part(batches: Iterable[Any]) -> Iterator[Any]:
    """Of each batch what this process takes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return (batch[rank::world] for batch in batches)


def shuffled(count: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Numbers below `count` in batches, without end; a new order for each round."""
    if count < batch:
        raise LlavaError(
            f"{amount(count, 'record gives', 'records give')} no batch of {batch}; bring more, or give a smaller "
            f"--batch-size"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]
