"""Flags of training: three dataclasses, read from a command line of today or of the published scripts.

`parse_arguments(argv)` translates old spellings, builds the dataclasses and refuses what can't be, all before
a model is loaded.
"""

import argparse
import logging
import os
import sys
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, cast, get_args

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import DataClassType

from llava.commandline import HelpFormatter, command_name
from llava.errors import LlavaError
from llava.train.checks import check, check_distribution
from llava.train.derived_flags import choose_workers, derive_flags, is_main_process
from llava.train.legacy_flags import translate_flags
from llava.train.progress import MOST_LOGGING_STEPS
from llava.train.step import gpu
from llava.train.step.compute import flags_of_the_path, half_precision_of, join_group_of_one
from llava.train.validation.flags import ValidationArguments

logger = logging.getLogger(__name__)


def _flag(default: Any, help: str) -> Any:
    """A flag. Of one that `parse_arguments` refuses to be without the annotation leaves out None."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model to start from and what of it to train."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = _flag(None, "language model or LLaVA checkpoint to start from")
    version: str | None = _flag(
        None, "prompt template (default: the checkpoint's own, else v0); unknown names are refused"
    )
    freeze_backbone: bool = _flag(False, "keep the language model as it is")
    tune_mm_mlp_adapter: bool = _flag(False, "stage 1: train the projector alone")
    freeze_mm_mlp_adapter: bool = _flag(False, "keep the projector as it is")
    unfreeze_mm_vision_tower: bool = _flag(False, "train the vision tower too")
    vision_tower: str | None = _flag(None, "the vision tower's directory or hub id (default: the checkpoint's own)")
    mm_vision_select_layer: int | None = _flag(
        None, "tower layer whose output is used (default: the checkpoint's, else -2)"
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] | None = _flag(
        None, "with or without the class token (default: the checkpoint's, else patch)"
    )
    pretrain_mm_mlp_adapter: str | None = _flag(None, "mm_projector.bin of a stage 1 to start from")
    fit_projector: bool = _flag(
        False, "start from a projector solved so that an image's patches come near the words of its records"
    )
    mm_projector_type: str | None = _flag(
        None, "linear, mlpNx_gelu or identity (default: the checkpoint's, else linear)"
    )
    mm_use_im_start_end: bool | None = _flag(None, "set images between <im_start> and <im_end>")
    mm_use_im_patch_token: bool | None = _flag(None, "add <im_patch> to the vocabulary")
    mm_image_token_scheme: Literal["placeholder", "patch"] | None = _flag(
        None, "how images stand in the text; patch is LLaVA-Med v1.0's (default: the checkpoint's)"
    )
    attn_implementation: str | None = _flag(
        None, "sdpa, eager, flash_attention_2, … (train_mem takes the fastest that is installed)"
    )


@dataclass
class DataArguments:
    """Records and images."""

    _argument_group_name: ClassVar[str] = "data"

    data_path: str = _flag(None, "records: JSON, JSONL or Parquet")
    data_description: str | None = _flag(
        None, "a line on what the records are; the checkpoint keeps it, and the web page shows it (default: unchanged)"
    )
    image_folder: str | None = _flag(None, "folder that the records' image names are relative to")
    lazy_preprocess: bool | None = _flag(
        None, "tokenise each record when it is needed (default: only if there are more than 50,000)"
    )
    image_aspect_ratio: Literal["square", "pad", "keep", "anyres"] | None = _flag(
        None, "how images are fitted (default: the checkpoint's, else square)"
    )
    skip_unreadable_images: bool = _flag(
        False, "leave out records whose image is missing or unreadable, count and name them"
    )
    jpeg_draft: bool = _flag(
        False, "decode large JPEGs at twice the size needed in place of their own: faster, pixels differ a little"
    )
    cache_vision_features: bool = _flag(False, "compute the frozen tower's output once per distinct image and keep it")
    vision_cache_dir: str | None = _flag(
        None, "folder of those features; several runs may share it (default: <output_dir>/vision_cache)"
    )
    packing: bool = _flag(False, "join the samples of a batch without padding, attention and positions kept apart")
    max_tokens_per_batch: int | None = _flag(
        None, "with --packing: tokens that each batch is filled up to, in place of a number of samples"
    )
    questions_per_image: int = _flag(
        1,
        "with --max_tokens_per_batch: up to so many records of an image stand behind one copy of it, each as if alone",
    )


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """The Trainer's own flags and those of this family of scripts."""

    _argument_group_name: ClassVar[str] = "training"

    if TYPE_CHECKING:
        output_dir: str  # the Trainer fills it in

    overwrite_output_dir: bool = _flag(False, "start anew: remove what an earlier run left in the output folder")
    resume_from_checkpoint: str | None = _flag(
        None, "True: go on with the run in the output folder also if flags or data differ; or a folder checkpoint-N"
    )
    cache_dir: str | None = _flag(None, "where hub ids are downloaded to (default: the hub's cache)")
    remove_unused_columns: bool = _flag(False, "the collator decides what the model gets")
    logging_steps: float | None = _flag(  # type: ignore[assignment]  # filled in below
        None, "steps between two logged losses (default: a fiftieth of the run, at most 500)"
    )
    logging_nan_inf_filter: bool = _flag(False, "off: a loss that isn't a number stops the run")
    model_max_length: int = _flag(2048, "longest sample in tokens, image positions included; longer ones are cut")
    loss_normalisation: Literal["micro_batches", "tokens"] | None = _flag(
        None, "a step's loss: mean of its micro-batches' means, or over all its tokens (default with full packs)"
    )
    dataloader_num_workers: int | None = _flag(  # type: ignore[assignment]  # filled in by derived_flags
        None, "processes that read and decode ahead for each training process (default: by its cores)"
    )
    dataloader_persistent_workers: bool | None = _flag(  # type: ignore[assignment]
        None, "keep them over epochs (default: where there are any)"
    )
    global_batch_size: int | None = _flag(
        None, "samples per optimizer step over all processes; finds --gradient_accumulation_steps"
    )
    mm_projector_lr: float | None = _flag(None, "learning rate of the projector")
    mm_vision_tower_lr: float | None = _flag(None, "learning rate of the vision tower")
    group_by_modality_length: bool = _flag(False, "batches of like length, with and without images apart")
    bits: int = _flag(16, "16, or 8 or 4: load the language model quantized (with --lora_enable)")
    double_quant: bool | None = _flag(
        None, "with --bits 4: quantize the scales too (default: True, or a quantized checkpoint's own)"
    )
    quant_type: Literal["nf4", "fp4"] | None = _flag(
        None, "with --bits 4: the data type (default: nf4, or a quantized checkpoint's own)"
    )
    lora_enable: bool = _flag(False, "train low-rank adapters instead of the language model")
    lora_r: int = _flag(64, "rank")
    lora_alpha: int = _flag(16, "scale; the update is multiplied by lora_alpha / lora_r")
    lora_dropout: float = _flag(0.05, "dropout before the adapters")
    lora_bias: Literal["none", "all", "lora_only"] = _flag("none", "which biases are trained")
    lora_weight_path: str | None = _flag(None, "adapter directory to continue from")
    lora_target_modules: str | None = _flag(
        None, "names of layers, by comma (default: every linear layer of the language model but lm_head)"
    )
    keep_half_weights: bool | None = _flag(
        None,
        "one GPU in half precision: keep the weights' half-precision copies over an optimizer step, "
        "2 bytes per parameter (default: of as many layers as fit)",
    )
    activation_memory_budget: float | None = _flag(
        None,
        "with --torch_compile: share of its activations that a layer keeps for the backward pass; the cheapest are "
        "computed again first, matrix products last (default: 1)",
    )
    master_weights: bool | None = _flag(
        None,
        "keep trained weights and sums of gradients in float32 (default); False: in bfloat16 alone, rounded at random, "
        "with --optim adamw_torch_8bit: 6 bytes per parameter in place of 16",
    )
    peak_tflops: float | None = _flag(None, "what one device can do at best, for MFU (default: known GPUs)")

    def __post_init__(self):
        if self.fsdp == "True":
            self.fsdp = cast(str, True)  # the Trainer's own value for it, by its code
        self.logs_by_length = self.logging_steps is None
        self.logging_steps = self.logging_steps or MOST_LOGGING_STEPS
        choose_workers(self, on_gpu=torch.cuda.is_available() and not self.use_cpu)
        if self.accelerator_config is None:
            # Copies to the GPU don't wait; sharded gradients are reduced in each micro-batch, or every process would
            # hold all of them whole until the last.
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory and not self.use_cpu}
            if self.fsdp:
                self.accelerator_config["gradient_accumulation_kwargs"] = {"sync_each_batch": True}
        # The Trainer would compile the whole model, which breaks at the loss and at every gathered layer; here each
        # layer is compiled by itself, one graph for all of them (llava.train.step.compute).
        self.compile_layers = self.torch_compile or bool(self.torch_compile_backend or self.torch_compile_mode)
        self.compile_options = {"backend": self.torch_compile_backend or "inductor", "mode": self.torch_compile_mode}
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        self.master_weights = self.master_weights is not False
        # The Trainer knows no LLaVA among Liger's families, and would say nothing (llava.train.step.liger).
        self.liger, self.use_liger_kernel = self.use_liger_kernel, False
        super().__post_init__()
        if not self.master_weights:
            self.mixed_precision = "no"  # the weights themselves are in half precision: nothing is to be cast

    @property
    def recomputes_activations(self) -> bool:
        """Whether layers compute their activations again in the backward pass (renamed in transformers 5.20)."""
        return bool(getattr(self, "activation_checkpointing", False) or getattr(self, "gradient_checkpointing", False))

    @property
    def recomputed_layers(self) -> Any:
        """One of so many layers does so, as the flag says it."""
        given = (getattr(self, f"{kind}_checkpointing_kwargs", None) for kind in ("activation", "gradient"))
        return next((one for one in given if isinstance(one, dict)), {}).get("every_n_layers", 1)


@dataclass
class Arguments:
    """All that a run was asked for."""

    model: ModelArguments
    data: DataArguments
    training: LlavaTrainingArguments
    validation: ValidationArguments = field(default_factory=ValidationArguments)
    given: dict[str, Any] = field(default_factory=dict)
    """The flags that the command line has, with their values."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What each flag is where it isn't given."""

    def held_out(self) -> "Arguments":
        """The same with the held-out records in place of those to train on."""
        data, held = self.data, self.validation
        assert held.eval_data_path is not None, "there are no held-out records"
        folder = held.eval_image_folder or data.image_folder
        return replace(self, data=replace(data, data_path=held.eval_data_path, image_folder=folder))


COMMON = (
    *("model_name_or_path", "version", "vision_tower", "tune_mm_mlp_adapter", "pretrain_mm_mlp_adapter"),
    *("data_path", "image_folder", "eval_data_path", "eval_strategy", "output_dir", "overwrite_output_dir"),
    *("num_train_epochs", "max_steps", "learning_rate"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length", "packing", "bf16"),
    *("gradient_checkpointing", "lora_enable", "bits", "save_steps", "resume_from_checkpoint", "report_to", "use_cpu"),
)
"""The flags that `--help` shows."""
_HELP = ("help", "help_all", "debug")
_PLAINER = {
    "output_dir": "folder of the model and its checkpoints",
    "eval_strategy": "when the held-out records are measured: no, steps or epoch",
    "num_train_epochs": "times over all records",
    "max_steps": "optimizer steps in place of epochs",
    "per_device_train_batch_size": "samples at once on each device",
    "gradient_accumulation_steps": "batches of each optimizer step",
    "learning_rate": "at its highest",
    "bf16": "compute in bfloat16, weights and sums in float32",
    "gradient_checkpointing": "compute activations again in the backward pass: less memory, more time",
    "save_steps": "optimizer steps between two checkpoints, or a share of the run",
    "report_to": "tensorboard, wandb or none",
    "use_cpu": "train without a GPU",
    "debug": "show the traceback of an error (the Trainer's values: underflow_overflow, tpu_metrics_debug)",
}
"""Help in place of the library's."""
DESCRIPTION = """Train a LLaVA: stage 1 (projector), stage 2, VQA fine-tuning, LoRA and QLoRA.

Killed, the same command goes on at the newest whole checkpoint; the folder then holds model, summary and loss curve.
These are the flags that people use; --help-all shows every one."""
EXAMPLE = """llava-med train --model_name_or_path CHECKPOINT --data_path train.json --image_folder images \\
    --output_dir runs/own --num_train_epochs 3 --learning_rate 2e-5"""


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one line, and whose help shows the flags that people use."""

    def error(self, message: str) -> NoReturn:
        raise LlavaError(f"{message}; see --help")

    def format_help(self) -> str:
        shown = (
            {action.dest for action in self._actions}
            if {"--help-all", "--help_all"} & set(sys.argv)
            else {*COMMON, *_HELP}
        )
        for action in self._actions:
            if action.dest not in shown:
                action.help = argparse.SUPPRESS
        return super().format_help()


def build_parser() -> HfArgumentParser:
    """The parser of every flag. `--help` shows those of `COMMON`, `--help-all` all: ours, then the Trainer's."""
    classes = (ModelArguments, DataArguments, LlavaTrainingArguments, ValidationArguments)
    parser = _Parser(
        [DataClassType(one) for one in classes],
        prog=command_name(),
        usage="%(prog)s --model_name_or_path MODEL --data_path RECORDS --output_dir FOLDER [FLAGS]",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        description=DESCRIPTION,
        epilog=f"example:\n  {EXAMPLE}",
    )
    parser.add_argument("--help-all", "--help_all", action="help", help="show every flag, the library's own too")
    for action in parser._actions:
        action.help = _PLAINER.get(action.dest, action.help)
    return parser


def parse_arguments(argv: list[str], *, keep_fsdp: bool = False) -> Arguments:
    """Read a command line of today or of the published scripts.

    Old names are translated with one warning each; values that can't be are refused.

    Raises:
        LlavaError: an unknown flag, a value that can't be, flags that contradict each other, a missing file.
    """
    arguments = read_flags(argv, keep_fsdp=keep_fsdp)
    check(arguments)
    check_distribution(arguments.training)
    derive_flags(arguments.data, arguments.training)
    return arguments


def read_flags(argv: list[str], *, keep_fsdp: bool = False) -> Arguments:
    """The dataclasses of a command line, not yet checked against files or each other."""
    has_gpu = gpu.has_gpu() or torch.backends.mps.is_available()
    argv, warnings = translate_flags(argv, boolean_flags(), has_gpu=has_gpu, keep_fsdp=keep_fsdp)
    for warning in warnings:
        if is_main_process():
            logger.warning(warning)
    typed = list(argv)
    argv = _one_pack(argv)
    if gpu.has_gpu():
        argv = _for_gpus(argv)
    if gpu.is_described():
        argv = _without_hardware(argv)
    try:
        model, data, training, validation, rest = build_parser().parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, OSError) as error:
        # The Trainer's dataclass checks its own flags and raises these.
        raise LlavaError(f"a flag has an invalid value: {' '.join(str(error).split())}") from error
    if rest:
        raise LlavaError(f"unknown argument {rest[0]!r}; see --help")
    given, defaults = _given(typed)
    return Arguments(model, data, training, validation, given, defaults)


def _given(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags that were typed with their values, and the default of each flag."""
    parser = build_parser()
    values = vars(parser.parse_known_args(argv)[0])
    names = {word.removeprefix("--") for word in argv if word.startswith("--")}
    given = {name: value for name, value in values.items() if name in names}
    return given, {name: parser.get_default(name) for name in values}


def _for_gpus(argv: list[str]) -> list[str]:
    """The command line with what a run on GPUs needs; a run in half precision joins its process group."""
    parser = build_parser()
    argv = argv + half_precision_of(parser.parse_known_args(argv)[0])
    argv = argv + flags_of_the_path(parser.parse_known_args(argv)[0], int(os.environ.get("WORLD_SIZE", "1")))
    join_group_of_one(parser.parse_known_args(argv)[0])
    return argv


def _without_hardware(argv: list[str]) -> list[str]:
    """The command line of a dry run: set up for a GPU, run on tensors without content, which lie on the CPU."""
    argv = list(argv)
    for place, word in enumerate(argv):
        if word == "--tf32":
            argv[place + 1] = "False"
    return [*argv, "--use_cpu", "True", "--dataloader_num_workers", "0", "--dataloader_pin_memory", "False"]


def _one_pack(argv: list[str]) -> list[str]:
    """Batches that are filled up to a number of tokens hold one pack, unless so many are asked for."""
    given = {word for word in argv if word.startswith("--")}
    one = "--max_tokens_per_batch" in given and "--per_device_train_batch_size" not in given
    return [*argv, "--per_device_train_batch_size", "1"] if one else argv


def boolean_flags() -> set[str]:
    """Names of the flags that hold True or False."""
    names = set()
    for cls in (ModelArguments, DataArguments, LlavaTrainingArguments, ValidationArguments):
        names |= {f.name for f in fields(cls) if f.type is bool or bool in get_args(f.type)}
    return names
