"""LoRA and QLoRA: adapters on the language model's linear layers, the projector is trained whole."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llava.errors import LlavaError, library_errors
from llava.folders import expanded
from llava.model.convert.model_card import write_model_card
from llava.model.language_model import LlavaForCausalLM
from llava.train.arguments import Arguments

if TYPE_CHECKING:
    from peft import PeftModel

NON_LORA = "non_lora_trainables.bin"
"""File of the trained weights that are no adapter (projector, tower), named as LLaVA's training names it."""


def add_adapters(model: LlavaForCausalLM, arguments: Arguments) -> "PeftModel":
    """Freeze the language model and put adapters on it; what else was trainable stays so.

    Returns the peft model; `--lora_weight_path` continues an adapter in place of a new one.
    """
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    training = arguments.training
    torch.manual_seed(training.seed)  # the adapters' first weights
    kept = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ("mm_projector" in name or "vision_tower" in name)
    ]
    if training.bits < 16:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.recomputes_activations)
    if training.lora_weight_path:
        folder = expanded(training.lora_weight_path)
        if not (folder / "adapter_config.json").is_file():
            raise LlavaError(f"--lora_weight_path {folder}: no adapter_config.json, so this is no LoRA folder")
        with library_errors(f"--lora_weight_path {folder}: not an adapter of this model"):
            peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
            load_non_lora(peft_model, folder)
        _refuse_other_form(peft_model, arguments)
    else:
        config = LoraConfig(
            r=training.lora_r,
            lora_alpha=training.lora_alpha,
            lora_dropout=training.lora_dropout,
            bias=training.lora_bias,
            target_modules=target_modules(model, training.lora_target_modules),
            task_type="CAUSAL_LM",
        )
        peft_model = get_peft_model(model, config)
        base = str(expanded(arguments.model.model_name_or_path))
        peft_model.peft_config["default"].base_model_name_or_path = (
            str(Path(base).resolve()) if Path(base).exists() else base
        )
    for name, parameter in peft_model.named_parameters():
        if name.removeprefix("base_model.model.") in kept:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    if training.recomputes_activations:
        peft_model.enable_input_require_grads()
    return peft_model


def _refuse_other_form(peft_model: "PeftModel", arguments: Arguments) -> None:
    """A continued adapter keeps its form: flags that say otherwise would have no effect."""
    settings: Any = peft_model.peft_config["default"]
    own = {
        "lora_r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "lora_bias": settings.bias,
    }
    for name, value in own.items():
        if arguments.given.get(name, value) != value:
            raise LlavaError(
                f"--{name} {arguments.given[name]}: the adapter of --lora_weight_path was made with {value}; "
                "leave the flag out"
            )
    if "lora_target_modules" in arguments.given:
        raise LlavaError("--lora_target_modules: the adapter of --lora_weight_path has its own; leave the flag out")


def target_modules(model: nn.Module, wanted: str | None = None) -> str:
    """A pattern of the layers that get adapters: linear ones of the language model, lm_head, tower, projector not.

    `wanted` restricts them to these last names (`q_proj,v_proj`).

    Raises:
        LlavaError: a wanted name is no linear layer of the model.
    """
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.match(r"model\.layers\.\d+\.", name)
    }
    names = sorted(found) if wanted is None else [name.strip() for name in wanted.split(",")]
    unknown = [name for name in names if name not in found]
    if unknown:
        raise LlavaError(
            f"--lora_target_modules: no linear layer {', '.join(unknown)}; there are {', '.join(sorted(found))}"
        )
    return rf"model\.layers\.\d+\..*\.({'|'.join(map(re.escape, names))})"


def save_adapter(peft_model: "PeftModel", folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """Write adapter, other trained weights and config: the layout of LLaVA's LoRA directories, in safetensors."""
    peft_model.save_pretrained(str(folder), state_dict=state_dict)
    state = peft_model.state_dict() if state_dict is None else state_dict
    names = [
        name for name, parameter in peft_model.named_parameters() if parameter.requires_grad and "lora_" not in name
    ]
    torch.save({name: state[name].detach().to("cpu", copy=True) for name in names if name in state}, folder / NON_LORA)
    cast(LlavaForCausalLM, peft_model.get_base_model()).config.save_pretrained(str(folder))
    settings: Any = peft_model.peft_config["default"]
    write_model_card(  # in place of peft's, which is a form to fill in
        folder,
        f"A LoRA adapter of a LLaVA (rank {settings.r}, scale {settings.lora_alpha / settings.r:g}), with what was "
        f"trained beside it. It is loaded over its base, which adapter_config.json names and `--model-base` where that "
        f"is elsewhere; `llava-med merge-lora` makes one model of both.",
        base=settings.base_model_name_or_path,
    )


def load_non_lora(peft_model: nn.Module, folder: Path) -> None:
    """Give the model, sharded or not, the trained weights that are saved with an adapter."""
    path = folder / NON_LORA
    if not path.is_file():
        return
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    for name, parameter in peft_model.named_parameters():
        if name in tensors and isinstance(parameter, DTensor):  # every process has read the file: nothing is sent
            whole = tensors[name].to(parameter.device)
            tensors[name] = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    unexpected = peft_model.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected:
        raise LlavaError(f"{path}: the model has no {unexpected[0]}")
