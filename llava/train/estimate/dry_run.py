"""A training command on tensors without content, from its flags to its optimizer step and checkpoint, and what follows
from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any, cast

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from llava.bars import tqdm
from llava.errors import LlavaError
from llava.records import read_json
from llava.train.arguments import Arguments, read_flags
from llava.train.checks import check_values
from llava.train.derived_flags import derive_flags
from llava.train.estimate.batches import Batches, batches_of
from llava.train.estimate.compiled import DryCompiler, steps_carried_out
from llava.train.estimate.costs import Clock
from llava.train.estimate.dry_trainer import DryTrainer, Taken
from llava.train.estimate.eight_bit import multiplied_as_on_gpus
from llava.train.estimate.inputs.lengths import lengths_of
from llava.train.estimate.inputs.names import present_model
from llava.train.estimate.inputs.shapes import forget_content, shaped_model
from llava.train.estimate.tracker import Tracker
from llava.train.estimate.uneven import unlike_ranks
from llava.train.estimate.world import shapes_uncounted, shard_as_on_gpus, world
from llava.train.progress import flops_per_token
from llava.train.setup_run import build_trainer
from llava.train.step.hardware import GB, Gpu

SIMULATED = 3
"""Micro-batches of a step that are carried out: the first, one for all in the middle, the last."""
ASSUMED_RECORDS = 100_000
"""Where their number isn't known."""

ATTENTION = {
    "packed": "packed: variable-length kernel (flash-attn, or torch's varlen_attn)",
    "causal": "causal: fused kernel of scaled_dot_product_attention",
    "sdpa": "sdpa: fused kernel of scaled_dot_product_attention, with a mask",
    "eager": "eager: matrix products",
}
OFFLOADED = "{}: offloading to the host's memory isn't predicted: a GPU holds less than this, and a step takes longer"


@dataclass(frozen=True)
class Prediction:
    """Of one GPU of a run; GB are 1e9 bytes, seconds and rates those of an optimizer step."""

    gpu: Gpu
    gpus: int
    peak_gb: float
    parts_gb: dict[str, float]
    mfu: float
    mfu_eager: float | None
    """Where nothing is compiled; of a compiled run it is filled in by `beside_eager`."""
    step_seconds: float
    tokens_per_second: float
    """Of all GPUs together; padding isn't counted."""
    host_syncs_per_micro_batch: int
    host_syncs_per_step: int
    """After the micro-batches: clipping, the optimizer, logging."""
    attention: str
    reduce_dtype: str
    """Of the gradients where they are summed over processes; of one process, over micro-batches."""
    flops_per_step: float
    bytes_per_step: float
    samples_per_step: int
    samples_per_hour: float
    """Of samples of usual lengths (llava.train.estimate.inputs.lengths), on all GPUs."""
    records: int | None
    """Of the data; None where their number isn't known."""
    max_steps: int
    """That `--max_steps` sets, else 0 or less."""
    epochs: float
    """Of the recipe, where `max_steps` doesn't end it."""
    hours: float
    """Of the whole recipe; where the number of records isn't known, of ASSUMED_RECORDS."""
    notes: tuple[str, ...]
    """Where lengths are from, and what was taken otherwise than the flags say."""
    unlike_ranks: tuple[tuple[int, ...], ...]
    """Processes (by number) whose parts of the trained weights have other sizes than the first's, in groups of one
    size; () where all are alike."""
    operators_per_micro_batch: int
    micro_batches: int
    checkpoint_gb: float
    """On disk, of all processes: the model, and what resuming needs."""
    checkpoint_host_gb: float
    """Of this process's host memory, while a checkpoint is written."""
    checkpoint_peak_gb: float
    """Of this GPU's memory, while a checkpoint is written."""

    @property
    def fits(self) -> bool:
        return self.peak_gb <= self.gpu.usable_gb

    def flat(self) -> dict[str, Any]:
        """What `--json` writes."""
        fields = {name: value for name, value in vars(self).items() if name not in {"gpu", "unlike_ranks"}}
        return {"gpu": self.gpu.name, "fits": self.fits} | fields


def dry_run(
    argv: Sequence[str],
    gpu: Gpu,
    gpus: int,
    records: int | None = None,
    *,
    rank: int = 0,
    compiled: bool = True,
    progress: str | None = None,
) -> Prediction:
    """Carry out one optimizer step of a training command, and its checkpoint, on tensors without content.

    Args:
        argv: the flags of the training command; `--data_path`, `--image_folder` and `--output_dir` may be missing.
        gpus: processes, one GPU each.
        records: how many there are, where `--data_path` is missing.
        rank: the process to predict for.
        compiled: whether layers are compiled if the flags say so.
        progress: title of a progress bar.

    Raises:
        LlavaError: flags that can't be, a model that isn't there.
    """
    argv, notes = without_deepspeed(list(argv), gpus)
    tracker = Tracker(Clock(gpu, gpus))
    compiler = DryCompiler(tracker.fused, tracker.paused)
    with (
        tqdm(total=SIMULATED + 2, desc=progress, unit="part", leave=False, disable=progress is None) as bar,
        world(gpu, gpus, compiler, rank) as mode,
        TemporaryDirectory() as folder,
    ):
        arguments = read_flags([*argv, "--output_dir", folder])
        check_values(arguments)
        derive_flags(arguments.data, arguments.training)
        training = arguments.training
        arguments.model.model_name_or_path, note = present_model(arguments.model.model_name_or_path)
        notes += [note] if note else []
        training.compile_layers = training.compile_layers and compiled
        if training.liger:
            notes.append("--use_liger_kernel: its kernels aren't counted, layers are predicted without them")
        sharding: Any = training.fsdp_config
        if training.fsdp and sharding.pop("cpu_offload", False):
            training.fsdp_plugin_args.pop("cpu_offload")
            notes.append(OFFLOADED.format("--fsdp"))
        shard_as_on_gpus(training)
        plan = Plan(training.gradient_accumulation_steps, training.num_train_epochs, training.max_steps)
        _shorten(arguments)
        bar.total = training.gradient_accumulation_steps + 2  # the model, its micro-batches, what ends a step
        loaded = shaped_model(arguments, mode)
        bar.update()
        lengths = lengths_of(arguments, loaded, records)
        notes.append(lengths.note)
        batches = batches_of(arguments, loaded, lengths, SIMULATED * gpus)
        samples: Any = batches.samples
        trainer = cast(DryTrainer, build_trainer(arguments, loaded, samples, None, trainer_class=DryTrainer))
        forget_content(trainer.model, mode)
        trainer.watch(mode, tracker, bar.update)
        per_token = flops_per_token(trainer.model)
        trained = [parameter.shape for parameter in trainer.model.parameters() if parameter.requires_grad]
        with (
            steps_carried_out(tracker.fused),
            shapes_uncounted(tracker.paused),
            mode,
            tracker,
            multiplied_as_on_gpus(),
        ):
            trainer.train()
        bar.update()
        others = unlike_ranks(trained, gpus) if training.fsdp else ()
    return _prediction(tracker, trainer, plan, gpu, gpus, per_token, batches, lengths.records, notes, others)


def beside_eager(
    prediction: Prediction, argv: Sequence[str], gpu: Gpu, gpus: int, records: int | None = None
) -> Prediction:
    """The prediction of a compiled run with the MFU of the same run where nothing is compiled; others as they are."""
    if prediction.mfu_eager is not None:
        return prediction
    eager = dry_run(argv, gpu, gpus, records, compiled=False, progress="predicting, nothing compiled")
    return replace(prediction, mfu_eager=eager.mfu)


@dataclass(frozen=True)
class Plan:
    """What of a recipe isn't carried out."""

    micro_batches: int
    epochs: float
    max_steps: int


def without_deepspeed(argv: list[str], gpus: int) -> tuple[list[str], list[str]]:
    """The command line with FSDP 2 in place of DeepSpeed, which shards the same but can't run without content, and
    what is to be said of it."""
    names = [word.partition("=")[0].replace("-", "_") for word in argv]
    if "__deepspeed" not in names:
        return argv, []
    place = names.index("__deepspeed")
    _, is_joined, joined = argv[place].partition("=")
    end = place + (1 if is_joined else 2)
    file, rest = [joined] if is_joined else argv[place + 1 : end], argv[:place] + argv[end:]
    if not file:
        raise LlavaError("--deepspeed: expected a configuration file")
    content = read_json(file[0])
    zero = content.get("zero_optimization", {}) if isinstance(content, dict) else None
    if not isinstance(zero, dict) or not isinstance(zero.get("stage", 0), int):
        raise LlavaError(f"--deepspeed {file[0]}: no DeepSpeed configuration (zero_optimization with a stage)")
    notes = ["--deepspeed: predicted for FSDP 2, which shards as ZeRO does"]
    offloaded = [zero.get(f"offload_{part}") or {} for part in ("optimizer", "param")]
    if any(part.get("device", "none") != "none" for part in offloaded):
        notes.append(OFFLOADED.format("--deepspeed"))
    kind = {2: "shard_grad_op", 3: "full_shard"}.get(zero.get("stage", 0))
    return rest if kind is None or gpus == 1 else [*rest, "--fsdp", f"{kind} auto_wrap"], notes


def _shorten(arguments: Arguments) -> None:
    """One step of few micro-batches, and a checkpoint; where none is asked for, only what a finished run writes."""
    training = arguments.training
    training.save_only_model = training.save_only_model or training.save_strategy == SaveStrategy.NO
    training.eval_strategy = IntervalStrategy.NO
    training.load_best_model_at_end = False
    training.gradient_accumulation_steps = min(training.gradient_accumulation_steps, SIMULATED)
    training.max_steps = 1
    training.logging_steps = 10**9
    training.logging_first_step = False
    training.report_to = []
    training.disable_tqdm = True
    training.save_strategy = SaveStrategy.NO  # the only one is written at the step's end
    training.push_to_hub = False


def _prediction(
    tracker, trainer, plan: Plan, gpu: Gpu, gpus: int, per_token: int, batches: Batches, records: int | None,
    notes: list[str], others: tuple[tuple[int, ...], ...],
) -> Prediction:  # fmt: skip
    parts = [*_repeated(trainer.micro_batches, plan.micro_batches), (trainer.rest, 1)]

    def total(name: str) -> float:
        return sum(getattr(part, name) * times for part, times in parts)

    def work(name: str) -> float:
        return sum(getattr(part.work, name) * times for part, times in parts)

    seconds, tokens = total("seconds"), total("tokens")
    mfu = per_token * tokens / seconds / (gpu.peak_tflops * 1e12)
    samples = batches.at_once * plan.micro_batches * gpus
    per_hour = samples / seconds * 3600 / batches.share
    if plan.max_steps > 0:
        hours = plan.max_steps * seconds * batches.share / 3600
    else:
        hours = (records or ASSUMED_RECORDS) * plan.epochs / per_hour
    return Prediction(
        gpu=gpu,
        gpus=gpus,
        peak_gb=tracker.memory.peak / GB,
        checkpoint_gb=trainer.checkpoint.disk / GB,
        checkpoint_host_gb=trainer.checkpoint.host / GB,
        checkpoint_peak_gb=trainer.checkpoint.peak / GB,
        parts_gb={name: size / GB for name, size in sorted(tracker.memory.parts().items(), key=lambda one: -one[1])},
        mfu=mfu,
        mfu_eager=None if trainer.args.compile_layers else mfu,
        step_seconds=seconds,
        tokens_per_second=tokens * gpus / seconds,
        host_syncs_per_micro_batch=max(part.waits for part in trainer.micro_batches),
        host_syncs_per_step=trainer.rest.waits,
        attention=ATTENTION.get(trainer.attention_name, trainer.attention_name),
        reduce_dtype=_names_of(tracker.reduced or trainer.gradient_dtypes),
        flops_per_step=work("flops"),
        bytes_per_step=work("bytes"),
        samples_per_step=round(samples),
        samples_per_hour=per_hour,
        records=records,
        max_steps=plan.max_steps,
        epochs=plan.epochs,
        hours=hours,
        notes=tuple(notes),
        unlike_ranks=others,
        operators_per_micro_batch=trainer.micro_batches[-1].operators,
        micro_batches=plan.micro_batches,
    )


def _repeated(simulated: list[Taken], count: int) -> list[tuple[Taken, int]]:
    """(part, how often it occurs in a step of `count` micro-batches)."""
    if len(simulated) < SIMULATED:
        return [(part, 1) for part in simulated]
    first, middle, last = simulated
    return [(first, 1), (middle, count - 2), (last, 1)]


def _names_of(dtypes: set) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
