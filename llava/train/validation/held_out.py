"""Validation in the loop: the loss on held-out records, and when it ends a run.

A pass takes what its forward passes take: batches of like length (or packed), decoded ahead by the loader's workers,
one wait for the GPU at its end. It draws no random number, so a run with it trains as the same run without it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from llava.train.data.collator import META_KEYS
from llava.train.data.dataset import LlavaDataset, Report
from llava.train.data.worker_errors import plain_worker_errors
from llava.train.step.loss_watch import LossWatch
from llava.train.step.packing import fill_batches
from llava.train.validation.flags import metric_name

logger = logging.getLogger(__name__)


class Validation:
    """Measures a model that is being trained.

    Args:
        dataset: the held-out samples.
        collate: makes their batches, as in training.
        batch_size: samples of a batch on one process.
        max_tokens: in its place: tokens that packed batches are filled up to.
        answer: `answer(trainer) -> metrics` of generated answers (without "eval_"), called by every process.
    """

    def __init__(
        self,
        dataset: LlavaDataset,
        collate: Callable[[list], dict[str, Any]],
        *,
        batch_size: int,
        max_tokens: int | None = None,
        answer: Callable[[Any], dict[str, float]] | None = None,
    ):
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.answer = answer
        self.report = Report()
        self.seconds = 0.0
        """What all passes of this process took."""
        self._loader: DataLoader | None = None

    def measure(self, trainer) -> dict[str, float]:
        """`eval_loss` and what else there is; every process has to call it, and all get the same numbers.

        Raises:
            LlavaError: a loss is no finite number, or an image can't be read; it names the records.
        """
        started = time.monotonic()
        if trainer.is_world_process_zero():
            logger.info("step %d: evaluating %d held-out records", trainer.state.global_step, len(self.dataset))
        loss, tokens = self.loss(trainer)
        metrics = {"eval_loss": loss, "eval_target_tokens": tokens}
        if self.answer is not None:
            metrics |= {f"eval_{name}": value for name, value in self.answer(trainer).items()}
        seconds = time.monotonic() - started
        self.seconds += seconds
        metrics["eval_runtime"] = round(seconds, 3)
        return metrics

    @torch.no_grad()
    def loss(self, trainer) -> tuple[float, int]:
        """(cross entropy, targets): the mean over all held-out target tokens of all processes, and their number."""
        model = trainer.model_for_validation()
        watch = LossWatch(self.dataset.describe)
        losses, counts = [], []
        batches = iter(self._batches(trainer.args))
        while (batch := _next(batches)) is not None:
            meta = {key: batch.pop(key) for key in META_KEYS}
            self.report.add_batch(meta["report"])
            batch = trainer._prepare_inputs(send_to_device(batch, trainer.args.device, non_blocking=True))
            with trainer.compute_loss_context_manager():
                loss = model(**batch).loss.detach().float()
            counts.append(batch["target_positions"].shape[0])
            losses.append(loss)
            watch.note(loss, trainer.state.global_step, meta["sample_numbers"])
        watch.look()
        values = torch.stack(losses).double().cpu() if losses else torch.zeros(0, dtype=torch.float64)
        weights = torch.tensor(counts, dtype=torch.float64)
        total, tokens = trainer.sum_over_processes([float((values * weights).sum()), float(weights.sum())])
        return total / max(tokens, 1.0), int(tokens)

    def _batches(self, args) -> DataLoader:
        if self._loader is None:
            batches = even_batches(self.dataset.lengths(), self.batch_size, args.world_size, self.max_tokens)
            workers = args.dataloader_num_workers
            self._loader = DataLoader(
                self.dataset,
                batch_sampler=batches[args.process_index :: args.world_size],
                collate_fn=self.collate,
                num_workers=workers,
                multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None) if workers else None,
                prefetch_factor=args.dataloader_prefetch_factor if workers else None,
                persistent_workers=workers > 0,
                pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
                generator=torch.Generator(),  # or each pass would take a number from the training's
            )
        return self._loader


def _next(batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    with plain_worker_errors():
        return next(batches, None)


def even_batches(
    lengths: Sequence[int] | np.ndarray, batch_size: int, processes: int, max_tokens: int | None = None
) -> list[list[int]]:
    """All samples in batches of like length, longest first, as many batches for each process (process i has every
    `processes`th from i on): what is missing is made up by empty ones, since sharded weights are gathered by all."""
    lengths = np.asarray(lengths)
    if max_tokens:
        batches = fill_batches(lengths, max_tokens, seed=0, window=max(1, len(lengths)))
    else:
        order = np.argsort(-lengths, kind="stable").tolist()
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches + [[] for _ in range(-len(batches) % processes)]


class EarlyStopping(TrainerCallback):
    """Ends a run whose held-out metric has been no better for `patience` evaluations.

    What was measured is read from the run's log, which checkpoints keep: a resumed run counts on.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        name = metric_name(args)
        values = [log[name] for log in state.log_history if name in log]
        if not values:
            return
        if not args.greater_is_better:
            values = [-value for value in values]
        since = len(values) - 1 - values.index(max(values))
        if since >= self.patience:
            if state.is_world_process_zero:
                logger.info("step %d: %d evaluations without a better %s; ending", state.global_step, since, name)
            control.should_training_stop = True
