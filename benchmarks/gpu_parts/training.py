"""Parts of benchmarks/gpu.py that train: tiny models against the CPU's losses, and 7B-shaped layers at speed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from checkout import ROOT
from torch.utils.data import Dataset
from transformers import TrainerCallback

from gpu_parts.speed import device_of, synchronize

PACK = 4096
SECONDS = 75
"""At most, of all small trainings that run at once."""


def small_trainings(miniature: bool) -> dict:
    """Losses of tiny trainings on the GPU, all at once, each against the same on the CPU in float32."""
    half = ("--use_cpu", "True", "--bf16", "True") if miniature else ("--bf16", "True")
    lora = ("--lora_enable", "True", "--lora_dropout", "0", "--learning_rate", "5e-3")
    accumulated = ("--gradient_accumulation_steps", "2")
    fsdp = ("--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")
    saved = ("--save_strategy", "steps", "--save_steps", "4")
    runs = {  # flags, the CPU's run, largest difference allowed
        "bf16": (half, "cpu", 5e-2),
        "bf16 packed": ((*half, "--packing", "True"), "cpu", 5e-2),
        "bf16 stage 1": ((*half, "--tune_mm_mlp_adapter", "True"), "cpu stage 1", 5e-2),
        "bf16 accumulated": ((*half, *accumulated), "cpu accumulated", 5e-2),
        "bf16 recomputed": ((*half, "--gradient_checkpointing", "True", *saved), "cpu", 5e-2),
        "bf16 LoRA": ((*half, *lora), "cpu LoRA", 5e-2),
        "bf16 torchrun fsdp": ((*half, *fsdp, *accumulated), "cpu accumulated", 5e-2),
        "fp16": (("--fp16", "True"), "cpu", 2e-2),
        "float32": ((), "cpu", 1e-3),
    }
    cpu = {"cpu": (), "cpu accumulated": accumulated, "cpu LoRA": lora, "cpu stage 1": runs["bf16 stage 1"][0][2:]}
    if miniature:
        runs, cpu = {"bf16": runs["bf16"]}, {"cpu": ()}
    steps = 2 if miniature else 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, data = make_inputs(folder)
        commands = {run: (*flags, "--use_cpu", "True") for run, flags in cpu.items()}
        commands |= {run: flags for run, (flags, _, _) in runs.items()}
        failed = train_all(folder, base, data, commands, steps)
        losses = {run: losses_of(folder / run) for run in commands if run not in failed}
        differences, wrong = {}, [f"{run}: {text}" for run, text in failed.items()]
        for run, (_, against, allowed) in runs.items():
            if run in losses and against in losses:
                found = float(np.abs(np.subtract(losses[run], losses[against])).max())
                differences[run] = found
                if not found <= allowed:
                    wrong.append(f"{run}: losses {losses[run]} against {losses[against]}")
        if "bf16 recomputed" in losses:
            differences["bf16 resumed"] = resumed(folder, base, data, commands, steps, wrong)
    return {"largest_loss_difference": differences, "wrong": wrong}


def resumed(folder: Path, base, data, commands, steps: int, wrong: list[str]) -> float | None:
    """A run that goes on from the middle, against the one that ran through."""
    run = "bf16 recomputed"
    shutil.copytree(folder / run / "checkpoint-4", folder / "resumed" / "checkpoint-4")
    failed = train_all(folder, base, data, {"resumed": commands[run]}, steps)
    if failed:
        wrong.append(f"bf16 resumed: {failed['resumed']}")
        return None
    found = float(np.abs(np.subtract(losses_of(folder / run), losses_of(folder / "resumed"))).max())
    if not found <= 1e-3:
        wrong.append(f"bf16 resumed: losses differ by {found}")
    return found


def make_inputs(folder: Path):
    """(a tiny LLaVA, records)."""
    from tests.tiny import make_llava
    from tests.train.helpers import make_records

    return make_llava(folder / "base"), make_records(folder / "data", 24, text_only_every=3)


def train_all(folder: Path, base, data, commands: dict[str, tuple], steps: int) -> dict[str, str]:
    """Start all trainings at once; {name: the end of its stderr} of those that failed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    processes = {}
    for run, flags in commands.items():
        words = [
            *("--model_name_or_path", base, "--data_path", data, "--image_folder", data.parent / "images"),
            *("--output_dir", folder / run, "--per_device_train_batch_size", "2", "--max_steps", steps),
            *("--logging_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-3", "--model_max_length", "256"),
            *("--report_to", "none", "--disable_tqdm", "True", "--lr_scheduler_type", "cosine", *flags),
        ]
        launcher = [sys.executable, "-m"]
        if "--fsdp" in flags:
            launcher += ["torch.distributed.run", "--nproc_per_node=1", "--standalone", "-m"]
        log = (folder / f"{run}.log").open("w")
        processes[run] = subprocess.Popen(
            [*launcher, "llava.train.train", *map(str, words)],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    deadline = time.monotonic() + SECONDS
    failed = {}
    for run, process in processes.items():
        try:
            code = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends what it has started
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            code = f"still running after {SECONDS} s"
        if code:
            failed[run] = f"{code}: {(folder / f'{run}.log').read_text()[-2500:]}"
    return failed


def losses_of(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


WHOLE = ("--torch_compile", "True", "--optim", "adamw_torch_8bit", "--master_weights", "False")
"""Flags of scripts/one_80gb_gpu.sh, with which all layers of a 7B fit."""


def layers(miniature: bool, *flags: str) -> dict:
    """The real training of 7B-shaped layers, as many as fit, packed to 4096, four micro-batches a step."""
    from train_throughput import Features, make_model

    from llava.train.arguments import read_flags
    from llava.train.data.collator import Collator
    from llava.train.progress import flops_per_token, memory_mb, peak_tflops
    from llava.train.step.packing import training_attention
    from llava.train.trainer import LlavaTrainer

    device = device_of(miniature)
    pack = 600 if miniature else PACK
    precision = ("--use_cpu", "True") if miniature else ("--bf16", "True")
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", folder, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
        words += ["--max_steps", "6", "--learning_rate", "1e-5", "--report_to", "none", "--disable_tqdm", "True"]
        words += ["--logging_steps", "100", "--save_strategy", "no", "--packing", "True", *precision, *flags]
        arguments = read_flags(words)
        checkpointed = arguments.training.recomputes_activations
        hidden, middle, heads, vocabulary = (64, 128, 4, 500) if miniature else (4096, 11008, 32, 32003)
        count = 32 if flags == WHOLE and not miniature else layers_that_fit(device, checkpointed)
        model = make_model(hidden, count, middle, heads, vocabulary, device, seed=0)
        if arguments.training.master_weights is False:
            model.bfloat16()
        model.config.use_cache = False
        per_token = flops_per_token(model)
        packs = make_packs(24, pack, model.config.vocab_size)
        trainer = LlavaTrainer(
            model=model, args=arguments.training, train_dataset=packs,
            data_collator=Collator(0, packing=True, pack_length=pack, cache=Features()),
            write_model=lambda *_: None, describe=str,
            attention=partial(training_attention, model.config, packed=True, longest=pack),
        )  # fmt: skip
        watch = Watch(trainer, device)
        trainer.add_callback(watch)
        trainer.train()
    rate = watch.tokens / watch.seconds
    peak = peak_tflops(None)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "layers": model.config.num_hidden_layers,
        "half_weights_kept_gb": trainer.kept_copies.bytes / 1e9 if trainer.kept_copies else 0.0,
        "packs_full": packs.full,
        "tokens_per_second": rate,
        "mfu": rate * per_token / (peak * 1e12) if peak else None,  # of a GPU whose peak isn't known
        "step_seconds": watch.seconds / watch.steps,
        "peak_memory_gb": memory_mb() * 2**20 / 1e9,
        "waits_per_micro_batch": sum(watch.waits_within.values()) / 4,
        "waits_per_step": sum(watch.waits.values()),
        "waits_at": [f"{count} x {place}" for place, count in (watch.waits_within + watch.waits).most_common(12)],
        "kernels_per_step": watch.kernels,
        "gpu_busy_ms_of_a_step": watch.busy_ms,
        "top_kernels_ms": watch.top,
    }


def layers_that_fit(device: torch.device, checkpointed: bool) -> int:
    """How many layers of a 7B: 18 bytes per parameter (half-precision copies are kept), and what a layer keeps of a
    pack of 4096 tokens."""
    if device.type == "cpu":
        return 2
    free = torch.cuda.mem_get_info()[0] / 1e9
    kept = 0.05 if checkpointed else 0.85
    return int(max(1, min(32, (free * 0.93 - 4.7 - 4) / (3.64 + kept))))


class Packs(Dataset):
    """Groups of samples of the lengths of `train_throughput`, filled up to `size` tokens."""

    def __init__(self, samples, groups, full: float):
        self.samples, self.groups, self.full = samples, groups, full

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[dict]:
        return [
            {"number": n, "sample": self.samples[n], "skipped": None, "feature_rows": [0] * len(self.samples[n].images)}
            for n in self.groups[index]
        ]


def make_packs(count: int, size: int, vocabulary: int) -> Packs:
    from train_throughput import IMAGE_POSITIONS, draw_lengths, make_samples

    from llava.train.step.packing import fill_batches

    texts, with_image = draw_lengths(count * (size // 450 + 1), seed=0)
    samples = make_samples(texts.clip(20, size - IMAGE_POSITIONS), with_image, vocabulary, seed=0)
    lengths = [len(sample.input_ids) for sample in samples]
    groups = fill_batches(lengths, size, seed=0)
    fullest = sorted(groups, key=lambda group: -sum(lengths[n] for n in group))[:count]
    return Packs(samples, fullest, sum(lengths[n] for group in fullest for n in group) / (len(fullest) * size))


class Watch(TrainerCallback):
    """Steps 1–2 warm up, 3 counts waits for the GPU, 4–5 are timed, 6 is profiled."""

    def __init__(self, trainer, device: torch.device):
        self.trainer, self.device = trainer, device
        self.waits, self.waits_within = Counter(), Counter()
        self.seconds, self.tokens, self.steps = 0.0, 0, 2
        self.kernels, self.busy_ms, self.top = 0, 0.0, []
        self.profiler = None
        step = trainer.training_step

        def watched(*args, **kwargs):
            if trainer.state.global_step != 2:
                return step(*args, **kwargs)
            with counted_waits(self.waits_within, device):
                return step(*args, **kwargs)

        trainer.training_step = watched

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.rest = counted_waits(self.waits, self.device)
            self.rest.__enter__()

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.begun, self.tokens_begun = time.perf_counter(), self.trainer.tokens_seen
        if state.global_step == 5:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities = [torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.rest.__exit__(None, None, None)
        synchronize(self.device)
        if state.global_step in (4, 5):
            self.seconds += time.perf_counter() - self.begun
            self.tokens += self.trainer.tokens_seen - self.tokens_begun
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            self._read(self.profiler.key_averages())

    def _read(self, events) -> None:
        kind = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        rows = sorted(events, key=lambda event: -getattr(event, kind))
        self.kernels = sum(event.count for event in rows)
        self.busy_ms = sum(getattr(event, kind) for event in rows) / 1e3
        self.top = [f"{getattr(row, kind) / 1e3:9.2f} ms {row.count:6} x {row.key[:110]}" for row in rows[:15]]


@contextmanager
def counted_waits(counter: Counter, device: torch.device):
    """Count by place in the code what makes the CPU wait for the GPU."""
    if device.type != "cuda":
        yield
        return
    usual = warnings.showwarning

    def note(message, category, filename, lineno, file=None, line=None):
        if "synchronizing" not in str(message):
            return usual(message, category, filename, lineno, file, line)
        frames = [frame for frame in traceback.extract_stack()[:-1] if "warnings" not in frame.filename]
        if any(frame.name == "set_sync_debug_mode" for frame in frames):
            return  # switching the mode is our own doing
        counter[" < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-6:]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
