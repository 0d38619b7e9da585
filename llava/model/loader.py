"""`load_pretrained_model`: any released layout, from a folder or a hub id, to a model that runs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from llava.conversation import get_template
from llava.errors import LlavaError
from llava.images import ImageProcessor
from llava.model.checkpoint.layouts import Parts, open_checkpoint
from llava.model.configuration import LlavaConfigFields
from llava.model.families import model_class_of
from llava.model.language_model import LlavaForCausalLM
from llava.model.tokenizer import add_tokens, load_tokenizer_of
from llava.model.weights.assemble import build_empty, fill_model
from llava.model.weights.locate import locate_model
from llava.model.weights.placement import Placement, choose_dtype, usable_device
from llava.model.weights.quantized import (
    Quantization,
    finish_quantized,
    prepare_quantized,
    split_quantization_state,
    stored_quantization,
)
from llava.tokenization import ImageTokens

log = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """What answering needs: `image_processor` turns images into the pixel values of this model's tower."""

    tokenizer: PreTrainedTokenizerBase
    model: LlavaForCausalLM
    image_processor: ImageProcessor
    context_len: int


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    quant_type: Literal["nf4", "fp4"] | None = None,
    double_quant: bool | None = None,
    device_map: str | dict[str, Any] | None = None,
    vision_tower: str | Path | None = None,
    conversation_template: str | None = None,
    config_fields: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    cache_dir: str | Path | None = None,
) -> LoadedModel:
    """Load a LLaVA checkpoint from a folder or a hub id.

    Args:
        model_path: LLaVA-Med v1.0, v1.5, LLaVA-1.5, BabyDoctor, a LoRA or projector folder, or transformers'
            `LlavaForConditionalGeneration`; told apart by what the files hold.
        model_base: the language model (or LLaVA) that a LoRA or projector folder was trained over.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; the best there is by default.
        dtype: `float32`, `float16`, `bfloat16`; the checkpoint's own by default.
        load_8bit: quantize the language model with bitsandbytes while loading.
        load_4bit: likewise, to 4 bits.
        quant_type: of 4 bits, nf4 or fp4; by default nf4, or what a checkpoint that is stored in 4 bits was made with.
        double_quant: with 4 bits, whether the scales are quantized too; by default so, or as the checkpoint was made.
        device_map: `auto`, or accelerate's map of modules to devices, to spread the model over several GPUs;
            by default a model that one GPU can't hold is spread over all.
        vision_tower: folder or hub id in place of the config's `mm_vision_tower`; a tower inside the
            checkpoint takes precedence over both.
        conversation_template: name of the prompt template, in place of the checkpoint's.
        config_fields: further fields of the LLaVA config in place of the checkpoint's.
        cache_dir: where hub ids are downloaded to; by default the hub's cache.

    Raises:
        LlavaError: what is missing, extra, misshapen or unreadable, and where; an adapter or a delta given as
            a whole model.
    """
    if load_8bit and load_4bit:
        raise LlavaError("load_8bit and load_4bit exclude each other; choose one")
    if conversation_template:
        get_template(conversation_template)  # an unknown name is an error before anything is read
    folder = locate_model(model_path, cache_dir=cache_dir)
    base_folder = None
    if model_base is not None:
        base_folder = locate_model(model_base, "base model", relative_to=folder, cache_dir=cache_dir)
    parts = open_checkpoint(folder, base_folder, vision_tower, cache_dir)
    _replace_fields(parts.config, dict(config_fields or {}))
    if conversation_template:
        parts.config.conversation_template = conversation_template
    device = usable_device(device)
    dtype = choose_dtype(dtype, parts.config, parts.weights, device)
    # Before the weights: a tokenizer that can't be read is found out in a second.
    tokenizer = load_tokenizer_of(parts.folders, folder)
    add_missing_image_tokens(tokenizer, parts.config, folder)
    quantization = Quantization(8 * load_8bit + 4 * load_4bit, quant_type, double_quant)
    model = load_model(parts, device, dtype, quantization, device_map, attn_implementation)
    processor = load_image_processor([*parts.folders, parts.tower_folder], model)
    model.get_vision_tower().image_processor = processor
    return LoadedModel(tokenizer, model, processor, context_length(parts.config))


def _replace_fields(config: LlavaConfigFields, fields: dict[str, Any]) -> None:
    unknown = sorted(name for name in fields if not hasattr(config, name))
    if unknown:
        raise LlavaError(f"the LLaVA config has no field {', '.join(unknown)}")
    for name, value in fields.items():
        setattr(config, name, value)


def load_model(
    parts: Parts,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> LlavaForCausalLM:
    """The model of an opened checkpoint, filled and placed, in evaluation mode."""
    config = parts.config
    model = build_empty(model_class_of(config), config, attn_implementation)
    quantization_state = _prepare_quantized(parts, model, quantization, dtype)
    placement = Placement(model, device, dtype, device_map, quantization.bits)
    fill_model(model, parts.sources(model), dtype, placement.device_of, quantization_state=quantization_state)
    if quantization_state is not None:
        finish_quantized(model)
    placement.dispatch(model)
    return model


def context_length(config: LlavaConfigFields) -> int:
    """Positions that the model was made for: `max_sequence_length` where the config has it."""
    return getattr(config, "max_sequence_length", None) or config.max_position_embeddings or 2048


def add_missing_image_tokens(tokenizer: PreTrainedTokenizerBase, config: LlavaConfigFields, folder: Path) -> None:
    """Give the tokenizer the image tokens that the config asks for, if the vocabulary has rows for them.

    Raises:
        LlavaError: it has none; the tokenizer belongs to another model.
    """
    known = tokenizer.get_vocab()
    missing = [token for token in ImageTokens.from_config(config).needed if token not in known]
    if not missing:
        return
    if len(tokenizer) + len(missing) > config.vocab_size:
        raise LlavaError(
            f"{folder}: the config asks for {', '.join(missing)}, but the tokenizer doesn't have them and the "
            f"model has {config.vocab_size} rows, no more than the tokenizer; the tokenizer's added_tokens.json "
            f"is missing"
        )
    log.warning("%s: the tokenizer lacked %s; added", folder, ", ".join(missing))
    add_tokens(tokenizer, missing, strip_blanks=False)


def load_image_processor(folders: list[Path | None], model: LlavaForCausalLM) -> ImageProcessor:
    """The image processor of the first of `folders` that has one, or the tower's own settings."""
    for place in folders:
        if place is not None and (found := ImageProcessor.find(place)) is not None:
            return found
    return ImageProcessor.from_pretrained(model.get_vision_tower().default_image_settings())


def _prepare_quantized(
    parts: Parts, model: LlavaForCausalLM, wanted: Quantization, dtype: torch.dtype
) -> dict[str, list[str]] | None:
    """Set the model up for 8 or 4 bits; the names of the stored quantization state, None if it isn't quantized."""
    if not parts.quantized:
        if not wanted.bits:
            return None
        prepare_quantized(model, wanted.config(dtype), None)
        return {}
    _, quantization_state = split_quantization_state(parts.weights)
    stored = stored_quantization(quantization_state)
    stored.check_wanted(wanted, parts.folders[0])
    prepare_quantized(model, stored.config(dtype), set(quantization_state))
    return quantization_state
