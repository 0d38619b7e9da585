"""Flags that follow from others where they weren't given: accumulation, the loss's normalisation, loader workers."""

import logging
import os
import sys
from typing import Any

from llava.errors import LlavaError, require

logger = logging.getLogger(__name__)

MOST_WORKERS = 8
"""Of one process; decoding for one GPU has never needed more."""
CAN_FORK = sys.platform == "linux"


def is_main_process() -> bool:
    """Whether this process is the one that logs and writes; needs no process group."""
    return int(os.environ.get("RANK", "0")) == 0


def derive_flags(data: Any, training: Any) -> None:
    """Set what follows; `data`, `training`: the parsed flags.

    Raises:
        LlavaError: `--global_batch_size` can't be made.
    """
    _set_accumulation(training)
    _set_normalisation(data, training)
    _set_wandb(training)
    if not training.master_weights and is_main_process():
        logger.info(
            "--master_weights False: weights are bfloat16 alone, which the optimizer rounds at random; gradients are "
            "summed over micro-batches in bfloat16 too, not in float32"
        )


def _set_wandb(training: Any) -> None:
    """Without a login, and nobody to ask for one, a run is kept on disk."""
    told = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ or sys.stdin.isatty()
    if "wandb" not in (training.report_to or []) or told:
        return
    wandb = require("wandb", "tracking")
    try:
        logged_in = wandb.login(prompt=False)
    except wandb.errors.Error:  # a login that its server can't be asked about
        logged_in = False
    if not logged_in:
        wandb.teardown()  # it has read its settings by now, and reads the environment anew
        os.environ["WANDB_MODE"] = "offline"
        if is_main_process():
            logger.warning("--report_to wandb: there is no login: the run stays in wandb/; wandb sync sends it later")


def default_workers(on_gpu: bool) -> tuple[int, str]:
    """(loader workers of this process, why so many), by the cores that each process has."""
    if not CAN_FORK:
        return 0, "workers are forked, which is sound on Linux alone"
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_gpu:
        return max(0, min(MOST_WORKERS, cores - 1)), f"{cores} cores per process"
    return min(2, cores // 4), f"the {cores} cores of each process are busy training"


def choose_workers(training: Any, *, on_gpu: bool) -> None:
    """Set what the flags leave open of the loader's workers."""
    if training.dataloader_num_workers is None:
        training.dataloader_num_workers, why = default_workers(on_gpu)
        if is_main_process():
            logger.info("--dataloader_num_workers %d (%s)", training.dataloader_num_workers, why)
    started = getattr(training, "dataloader_multiprocessing_context", None)  # older releases have no such flag
    if CAN_FORK and training.dataloader_num_workers > 0 and started is None:
        # Python 3.14 would start them anew, and the data can't be sent to them.
        training.dataloader_multiprocessing_context = "fork"
    if training.dataloader_persistent_workers is None:
        training.dataloader_persistent_workers = training.dataloader_num_workers > 0
    if training.dataloader_prefetch_factor is None and training.dataloader_num_workers > 0:
        training.dataloader_prefetch_factor = 4


def _set_accumulation(training: Any) -> None:
    if training.global_batch_size is None:
        return
    at_once = training.train_batch_size * training.world_size
    steps, rest = divmod(training.global_batch_size, at_once)
    if rest or steps == 0:
        raise LlavaError(
            f"--global_batch_size {training.global_batch_size} is no multiple of {at_once} "
            f"({training.world_size} processes × {training.train_batch_size} samples); "
            "change --per_device_train_batch_size"
        )
    training.gradient_accumulation_steps = steps


def _set_normalisation(data: Any, training: Any) -> None:
    if training.loss_normalisation is None:
        # Packs hold unlike numbers of targets: in a mean of means a token's weight would depend on its pack.
        training.loss_normalisation = "tokens" if data.max_tokens_per_batch else "micro_batches"
    if training.loss_normalisation == "tokens" and is_main_process():
        logger.info("--loss_normalisation tokens: every target token of an optimizer step weighs alike")
