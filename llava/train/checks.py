"""What a command line of training can't be: refused before anything is loaded."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.training_args import OptimizerNames

from llava.conversation import get_template
from llava.errors import LlavaError, library_errors, require
from llava.folders import expanded
from llava.train.step import gpu
from llava.train.step.optimizers import TORCHAO, takes_plain_tensors
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
    _check_optimizer(arguments)
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
        if value and not expanded(value).exists():
            raise LlavaError(f"--{flag} {value}: no such file or folder")
    for flag, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("vision_tower", model.vision_tower),
    ):
        # A hub id has one slash at most; what looks like a path has to be one.
        value = value or ""
        looks_like_path = value.startswith((".", "/", "~")) or value.count("/") > 1
        if looks_like_path and not expanded(value).is_dir():
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
        "questions_per_image": data.questions_per_image,
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
    for flag, number in (("seed", training.seed), ("data_seed", training.data_seed)):
        if number is not None and not 0 <= number < 2**32:
            raise LlavaError(f"--{flag} {number}: expected a whole number from 0 to below 2^32")
    if (training.dataloader_num_workers or 0) < 0:
        raise LlavaError(f"--dataloader_num_workers {training.dataloader_num_workers}: expected a number from 0 up")
    if training.bits not in {4, 8, 16}:
        raise LlavaError(f"--bits {training.bits}: expected 16, 8 or 4")
    every = training.recomputed_layers
    if type(every) is not int or every < 1:
        raise LlavaError(f"--gradient_checkpointing_kwargs: every_n_layers {every!r}: expected a whole number from 1")
    share = training.activation_memory_budget
    if share is not None and not 0 <= share <= 1:
        raise LlavaError(f"--activation_memory_budget {share}: expected a share from 0 to 1")
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
            model.fit_projector and not data.cache_vision_features,
            "--fit_projector reads the features of all images; add --cache_vision_features True",
        ),
        (
            model.fit_projector and bool(model.pretrain_mm_mlp_adapter),
            "--fit_projector solves for a projector and --pretrain_mm_mlp_adapter reads one; choose one",
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
            training.group_by_modality_length and training.train_sampling_strategy == "sequential",
            "--train_sampling_strategy sequential keeps the file's order, --group_by_modality_length shuffles batches; "
            "choose one",
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
            data.questions_per_image > 1 and not data.max_tokens_per_batch,
            "--questions_per_image joins records in full batches; add --packing True --max_tokens_per_batch N",
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
            training.liger and training.compile_layers,
            "--use_liger_kernel and --torch_compile both join a layer's small operations; choose one",
        ),
        (
            training.liger and not gpu.is_on_gpu(training.device),
            "--use_liger_kernel: Liger's kernels run on GPUs alone; leave it out",
        ),
        (
            training.activation_memory_budget is not None and not training.compile_layers,
            "--activation_memory_budget is for compiled layers; add --torch_compile True, or use "
            "--gradient_checkpointing True",
        ),
        (
            training.activation_memory_budget is not None and training.recomputes_activations,
            "--activation_memory_budget says what a layer keeps, --gradient_checkpointing that it keeps nothing; "
            "choose one",
        ),
        (
            training.lora_weight_path is not None and not training.lora_enable,
            "--lora_weight_path continues an adapter; add --lora_enable True",
        ),
    ]
    _refuse(contradictions)


def _check_optimizer(arguments: "Arguments") -> None:
    """What `--optim` and `--master_weights` can't do, and packages that are missing."""
    model, training = arguments.model, arguments.training
    name, whole = OptimizerNames(training.optim).value, training.master_weights
    in_part = training.lora_enable or model.tune_mm_mlp_adapter or model.freeze_backbone
    contradictions = [
        (
            not whole and name not in TORCHAO,
            f"--master_weights False: --optim {name} would round small changes of a bfloat16 weight to nothing; add "
            "--optim adamw_torch_8bit, which rounds at random",
        ),
        (
            not whole and not training.bf16,
            "--master_weights False keeps weights in bfloat16 alone; add --bf16 True (on a GPU that has bfloat16)",
        ),
        (
            not whole and in_part,
            "--master_weights False saves the memory of a language model that is trained whole; with --lora_enable, "
            "--tune_mm_mlp_adapter or --freeze_backbone leave it out",
        ),
        (
            not whole and bool(training.deepspeed),
            "--master_weights False: DeepSpeed keeps float32 weights of its own; use --fsdp or leave it out",
        ),
        (
            not whole and training.world_size > 1 and not training.fsdp,
            "--master_weights False: several processes would each round the same weights differently; add "
            '--fsdp "full_shard auto_wrap"',
        ),
        (
            bool(training.fsdp) and training.world_size > 1 and takes_plain_tensors(name),
            f"--fsdp: --optim {name} takes no sharded tensors; use --optim adamw_torch_8bit",
        ),
        (
            bool(training.fsdp) and name == "adagrad",
            "--optim adagrad: its sums are made before the weights are sharded (--fsdp, and half precision on GPUs), "
            "and don't follow them; use --optim adamw_torch",
        ),
    ]
    _refuse(contradictions)
    if name in TORCHAO:
        require("torchao", "torchao")
    if not training.optim_target_modules:  # what works on chosen layers is only known with the model
        with library_errors(f"--optim {name} can't be used here"):
            Trainer.get_optimizer_cls_and_kwargs(training, cast(PreTrainedModel, nn.Linear(1, 1)))
    if training.liger and not gpu.is_described():
        require("liger_kernel.transformers", "liger")


def _refuse(contradictions: list[tuple[bool, str]]) -> None:
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
