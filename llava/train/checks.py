"""What a command line of training can't be: refused before anything is loaded."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llava.conversation import get_template
from llava.errors import LlavaError
from llava.train.validation.flags import check_validation

if TYPE_CHECKING:
    from llava.train.arguments import Arguments, LlavaTrainingArguments


def check(arguments: "Arguments") -> None:
    """Refuse what can't be, before anything is loaded."""
    _check_paths(arguments)
    check_values(arguments)
    check_validation(arguments.validation, arguments.training)


def check_values(arguments: "Arguments") -> None:
    """Refuse numbers that can't be, flags that contradict each other, and unknown templates."""
    _check_numbers(arguments)
    _check_pairs(arguments)
    if arguments.model.version is not None:
        get_template(arguments.model.version)


def _check_paths(arguments: "Arguments") -> None:
    model, data, training = arguments.model, arguments.data, arguments.training
    value: str | None
    for flag, value in (("model_name_or_path", model.model_name_or_path), ("data_path", data.data_path)):
        if not value:
            raise LlavaError(f"--{flag} is needed")
    for flag, value in (
        ("data_path", data.data_path),
        ("image_folder", data.image_folder),
        ("pretrain_mm_mlp_adapter", model.pretrain_mm_mlp_adapter),
        ("lora_weight_path", training.lora_weight_path),
    ):
        if value and not Path(value).expanduser().exists():
            raise LlavaError(f"--{flag} {value}: no such file or folder")
    for flag, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("vision_tower", model.vision_tower),
    ):
        # A hub id has one slash at most; what looks like a path has to be one.
        value = value or ""
        looks_like_path = value.startswith((".", "/", "~")) or value.count("/") > 1
        if looks_like_path and not Path(value).expanduser().is_dir():
            raise LlavaError(f"--{flag} {value}: no such folder")
    if Path(training.output_dir).is_file():
        raise LlavaError(f"--output_dir {training.output_dir} is a file")


def _check_numbers(arguments: "Arguments") -> None:
    data, training = arguments.data, arguments.training
    at_least_one: dict[str, float | None] = {
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "model_max_length": training.model_max_length,
        "global_batch_size": training.global_batch_size,
        "lora_r": training.lora_r,
        "lora_alpha": training.lora_alpha,
        "max_tokens_per_batch": data.max_tokens_per_batch,
    }
    for flag, value in at_least_one.items():
        if value is not None and value < 1:
            raise LlavaError(f"--{flag} {value}: expected at least 1")
    rates = {
        "learning_rate": training.learning_rate,
        "mm_projector_lr": training.mm_projector_lr,
        "mm_vision_tower_lr": training.mm_vision_tower_lr,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
    }
    for flag, value in rates.items():
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise LlavaError(f"--{flag} {value}: expected a number from 0 up")
    if training.max_steps <= 0 and not (training.num_train_epochs > 0 and math.isfinite(training.num_train_epochs)):
        raise LlavaError(f"--num_train_epochs {training.num_train_epochs}: expected a number above 0")
    if training.bits not in {4, 8, 16}:
        raise LlavaError(f"--bits {training.bits}: expected 16, 8 or 4")
    if not 0 <= training.lora_dropout < 1:
        raise LlavaError(f"--lora_dropout {training.lora_dropout}: expected a number from 0 to below 1")


def _check_pairs(arguments: "Arguments") -> None:
    """Flags that contradict each other."""
    model, data, training = arguments.model, arguments.data, arguments.training
    contradictions = [
        (
            model.tune_mm_mlp_adapter and model.freeze_mm_mlp_adapter,
            "--tune_mm_mlp_adapter trains the projector alone and --freeze_mm_mlp_adapter freezes it; choose one",
        ),
        (
            model.tune_mm_mlp_adapter and training.lora_enable,
            "--tune_mm_mlp_adapter trains the projector alone and --lora_enable adapters; choose one",
        ),
        (
            training.bits < 16 and not training.lora_enable,
            f"--bits {training.bits} weights can't be trained themselves; add --lora_enable True",
        ),
        (
            data.cache_vision_features and model.unfreeze_mm_vision_tower,
            "--cache_vision_features keeps the output of a tower that --unfreeze_mm_vision_tower changes; choose one",
        ),
        (
            training.mm_vision_tower_lr is not None and not model.unfreeze_mm_vision_tower,
            "--mm_vision_tower_lr has no meaning while the tower is frozen; add --unfreeze_mm_vision_tower True",
        ),
        (
            training.mm_projector_lr is not None and model.freeze_mm_mlp_adapter,
            "--mm_projector_lr has no meaning with --freeze_mm_mlp_adapter; leave one out",
        ),
        (
            data.cache_vision_features and data.image_aspect_ratio == "anyres",
            "--cache_vision_features keeps one square per image, --image_aspect_ratio anyres makes several; choose one",
        ),
        (
            data.packing and training.group_by_modality_length,
            "--packing leaves no padding that --group_by_modality_length could save; choose one",
        ),
        (
            data.packing and training.train_sampling_strategy == "group_by_length",
            "--packing leaves no padding that --group_by_length (--train_sampling_strategy group_by_length) could "
            "save; choose one",
        ),
        (
            data.max_tokens_per_batch is not None and not data.packing,
            "--max_tokens_per_batch fills packed batches; add --packing True",
        ),
        (
            training.remove_unused_columns,
            "--remove_unused_columns True would take from samples what their batches need; leave it out",
        ),
        (
            bool(training.fsdp) and bool(training.deepspeed),
            "--fsdp and --deepspeed both shard the model; choose one",
        ),
        (
            training.fp16 and training.bf16,
            "--fp16 and --bf16 are two kinds of half precision; choose one",
        ),
        (
            training.lora_weight_path is not None and not training.lora_enable,
            "--lora_weight_path continues an adapter; add --lora_enable True",
        ),
    ]
    for wrong, message in contradictions:
        if wrong:
            raise LlavaError(message)


def check_distribution(training: "LlavaTrainingArguments") -> None:
    """Under torchrun each process must know of the others, or all would train alone on all the data."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and training.world_size != started:
        raise LlavaError(
            f"{started} processes were started but each would train alone (world size {training.world_size}); "
            "without GPUs add --use_cpu True, with GPUs check that torch sees them"
        )
