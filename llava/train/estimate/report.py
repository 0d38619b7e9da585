"""A prediction in words, and the flags that would make a recipe fit."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from llava.errors import LlavaError, amount
from llava.train.estimate.dry_run import ASSUMED_RECORDS, Prediction, dry_run
from llava.train.legacy_flags import is_true, split_flags

Ranks = Sequence[tuple[tuple[int, ...], Prediction]]
"""Processes of a run, by number, and what is predicted for each of them."""
IN_WORDS = {"moments": "the optimizer's moments", "gradients": "gradients, so far"}
"""Parts of the memory as a reader is told of them: as a backward pass begins, when activations are most, few gradients
are there."""


def lines_of(prediction: Prediction, ranks: Ranks = ()) -> Iterator[str]:
    """Whether it fits, then the prediction as a table, predicted and not measured; with the peaks of all `ranks`, if
    they differ."""
    p, gpu = prediction, prediction.gpu
    verdict = "fits" if p.fits else "does not fit"
    yield f"{verdict}: it takes {p.peak_gb:.1f} GB; of {gpu.memory_gb:g} GB, {gpu.usable_gb:.1f} GB are usable"
    yield f"predicted, not measured: {p.gpus} × {gpu.name}" + (", rates from its data sheet" if gpu.is_scaled else "")
    for note in p.notes:
        yield f"note: {note}"
    yield "memory of each GPU at the fullest moment of a step:"
    for name, size in p.parts_gb.items():
        if size >= 0.0005:
            yield f"  {IN_WORDS.get(name, name):28}{size:9.2f} GB"
    yield f"  {'peak of each GPU':28}{p.peak_gb:9.2f} GB"
    for of, one in ranks if len(ranks) > 1 else ():
        name = f"process {of[0]}" if len(of) == 1 else f"processes {of[0]} to {of[-1]}"
        yield f"    {name:26}{one.peak_gb:9.2f} GB"
    yield "work and time:"
    eager = f" ({p.mfu_eager:.1%} where nothing is compiled)" if p.mfu_eager not in (None, p.mfu) else ""
    rows = {
        "attention": p.attention,
        "gradients reduced in": p.reduce_dtype,
        "waits for the GPU": f"{p.host_syncs_per_micro_batch} a micro-batch, {p.host_syncs_per_step} a step more",
        "optimizer step": f"{p.step_seconds:.2f} s, {p.micro_batches} micro-batch{'es' * (p.micro_batches > 1)}, "
        f"{p.samples_per_step} samples",
        "arithmetic, memory traffic": f"{p.flops_per_step / 1e12:.1f} TFLOP, {p.bytes_per_step / 1e9:.0f} GB a step",
        "tokens": f"{p.tokens_per_second:,.0f} a second on all GPUs",
        "MFU": f"{p.mfu:.1%} of {gpu.peak_tflops:g} TFLOP/s" + eager,
        "a checkpoint": f"{p.checkpoint_gb:.1f} GB on disk; writing it takes {p.checkpoint_peak_gb:.1f} GB of the "
        f"GPU's memory and {p.checkpoint_host_gb:.1f} GB of the host's, in the first process",
        "samples of usual length": f"{p.samples_per_hour:,.0f} an hour",
    }
    unknown = p.records is None and p.max_steps <= 0
    length = amount(p.max_steps, "step") if p.max_steps > 0 else f"{p.epochs:g} epoch{'s' * (p.epochs != 1)}"
    rows["the whole recipe"] = f"{short(p.hours)} hours, {length}" + (
        f" of {ASSUMED_RECORDS:,} records (give their number: --records)" if unknown else ""
    )
    for name, text in rows.items():
        yield f"  {name:28}{text}"


def short(hours: float) -> str:
    """A number of hours, as exact as it is of use."""
    return f"{hours:.2f}" if hours < 1 else f"{hours:.1f}"


_LEAN = ["--optim", "adamw_torch_8bit", "--master_weights", "False"]
"""Moments in 8 bits and no weights in float32, as `scripts/one_80gb_gpu.sh` has it."""


def remedies(flags: Sequence[str], prediction: Prediction, records: int | None) -> Iterator[tuple[str, Prediction]]:
    """Flags that lower the peak, gentlest first, each with those before it, until it fits; predicted like the rest."""
    steps = [
        [] if _is_set(flags, "bf16", "fp16") else ["--bf16" if prediction.gpu.has_bf16 else "--fp16", "True"],
        ["--gradient_checkpointing", "True"],
        ["--keep_half_weights", "False"] if prediction.gpus == 1 else [],
        ["--per_device_train_batch_size", "1"],
        _LEAN if prediction.gpus == 1 and prediction.gpu.has_bf16 and find_spec("torchao") else [],
        ["--fsdp", "full_shard auto_wrap"] if prediction.gpus > 1 else [],
        ["--lora_enable", "True"],
        ["--model_max_length", "1024"],
    ]
    flags, best = list(flags), prediction.peak_gb
    for step in steps:
        if not step or (step[0] == "--lora_enable" and _is_set(flags, "tune_mm_mlp_adapter")):
            continue
        if step[0] == "--keep_half_weights" and not _is_set(flags, "bf16", "fp16"):
            continue
        try:
            changed = dry_run(
                [*flags, *step], prediction.gpu, prediction.gpus, records, progress="predicting what would help"
            )
        except LlavaError:
            continue  # the flags above exclude it
        if changed.peak_gb >= 0.99 * best or (step is _LEAN and not changed.fits):  # no LoRA goes with that one
            continue
        flags, best = [*flags, *step], changed.peak_gb
        yield " ".join(f'"{word}"' if " " in word else word for word in step), changed
        if changed.fits:
            return


def _is_set(flags: Sequence[str], *names: str) -> bool:
    """Whether one of these boolean flags says True, as training reads them."""
    given = split_flags(flags)
    return any(name in given and is_true(given[name]) for name in names)
