"""What the two makers of base models share: optimizers, the schedule, the loop with its bar and log."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from llava.demo.muon import Muon
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
    losses = []
    model.train()
    bar = tqdm(range(steps), desc=name, unit="step", mininterval=0.5)
    for _ in bar:
        loss = loss_of(next(batches))
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        losses.append(round(loss.item(), 4))
        bar.set_postfix(loss=losses[-1], refresh=False)
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / LOSSES, losses, indent=None)


def warm_cosine(step: int, steps: int) -> float:
    """Share of the highest rate: up over the first twentieth (60 steps at most), down along a cosine."""
    warm = max(1, min(60, steps // 20))
    return min(1.0, (step + 1) / warm) * (0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.01)


def shuffled(count: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Numbers below `count` in batches, without end; a new order for each round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]
