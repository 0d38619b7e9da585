"""What a person watches: a progress bar with loss, learning rate, tokens/s, MFU, memory and time left."""

import sys
import time

import torch
from transformers import TrainerCallback

from llava.bars import tqdm
from llava.train.step import gpu

MOST_LOGGING_STEPS = 500
"""The library's default."""
LOGGED_LOSSES = 50
"""At least so many in a run, if it has as many steps."""


def flops_per_token(model: torch.nn.Module) -> int:
    """Operations per token of one training step, the way MFU is counted.

    Two per parameter that multiplies for the forward pass, two for the gradient of the activations and two for
    that of the weight where it is trained. The embedding look-up, the tower and recomputation don't count; an
    embedding that is also the head does.
    """
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    not_counted = ("vision_tower", "mm_projector", *(() if tied else ("embed_tokens",)))
    total = 0
    for name, parameter in model.named_parameters():
        if any(part in name for part in not_counted) or parameter.ndim < 2:
            continue
        size = getattr(parameter, "ds_numel", parameter.numel())
        if getattr(parameter, "quant_state", None) is not None:
            size *= 2  # two weights per byte
        total += (6 if parameter.requires_grad else 4) * size
    return total


def peak_tflops(given: float | None) -> float | None:
    """The device's peak: as given, or from the table; None where neither tells."""
    return given or gpu.peak_tflops()


def memory_mb() -> float:
    """Most memory used so far, MB: the GPU's, or this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class LogInterval(TrainerCallback):
    """Where no --logging_steps is given: often enough for a curve, however short the run."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.logs_by_length and args.logging_steps == MOST_LOGGING_STEPS:
            state.logging_steps = max(1, min(MOST_LOGGING_STEPS, state.max_steps // LOGGED_LOSSES))


class ProgressBar(TrainerCallback):
    """The bar, on the main process; it is redrawn a few times per second at most, so it costs nothing."""

    def __init__(self, counter, per_token: int, peak: float | None, disable: bool = False):
        """`counter` has what this process did so far: `tokens_seen`, `data_seconds` (waited for batches) and
        `idle_seconds` (evaluated); `per_token` is in operations."""
        self.counter = counter
        self.per_token = per_token
        self.peak = peak
        self.disable = disable
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.tokens_before = time.monotonic(), self.counter.tokens_seen
        self.waited_before, self.idle_before = self.counter.data_seconds, self.counter.idle_seconds
        if state.is_world_process_zero and not self.disable:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        rate = self.tokens_per_second(args.world_size)
        if logs is not None and "loss" in logs:
            logs["tokens_per_second"] = round(rate, 1)
            logs["data_wait"] = round(self.data_wait(), 4)
            if self.peak:
                logs["mfu"] = round(rate * self.per_token / (self.peak * 1e12 * args.world_size), 4)
        if self.bar is None or not logs or not {"loss", "eval_loss"} & set(logs):
            return
        if "eval_loss" in logs:
            self.shown["held-out"] = f"{logs['eval_loss']:.4f}"
        else:
            self.shown["loss"] = f"{logs['loss']:.4f}"
            self.shown["lr"] = f"{logs.get('learning_rate', 0):.2e}"
            self.shown["tok/s"] = f"{rate:,.0f}"
            self.shown["data"] = f"{logs['data_wait']:.0%}"
        if "mfu" in logs:
            self.shown["MFU"] = f"{logs['mfu']:.1%}"
        self.shown["mem"] = f"{memory_mb() / 1024:.1f}G"
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def tokens_per_second(self, world_size: int = 1) -> float:
        """Real tokens (no padding) of all processes per second, so far; other ranks are taken to do as this one."""
        return (self.counter.tokens_seen - self.tokens_before) * world_size / self._trained_seconds()

    def data_wait(self) -> float:
        """Share of the time spent training that this process has waited for batches."""
        return (self.counter.data_seconds - self.waited_before) / self._trained_seconds()

    def _trained_seconds(self) -> float:
        evaluated = self.counter.idle_seconds - self.idle_before
        return max(time.monotonic() - self.started - evaluated, 1e-9)
