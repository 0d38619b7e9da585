"""`load_pretrained_model`: any released layout, from a folder or a hub id, to a model that runs."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.errors import LlavaError
from llava.images import ImageProcessor
from llava.model.checkpoint.layouts import Parts, open_checkpoint
from llava.model.configuration import SCHEME_PATCH, LlavaConfigFields
from llava.model.families import model_class_of
from llava.model.language_model import LlavaForCausalLM
from llava.model.tokenizer import add_tokens, load_tokenizer
from llava.model.weights.assemble import build_empty, fill_model
from llava.model.weights.locate import locate_model
from llava.model.weights.placement import Placement, best_device, choose_dtype
from llava.model.weights.quantized import (
    finish_quantized,
    prepare_quantized,
    quantization_config,
    split_quantization_state,
)

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
    device_map: str | dict[str, Any] | None = None,
    vision_tower: str | Path | None = None,
    conversation_template: str | None = None,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Load a LLaVA checkpoint from a folder or a hub id.

    Args:
        model_path: LLaVA-Med v1.0, v1.5, LLaVA-1.5, BabyDoctor, a LoRA or projector folder, or transformers'
            `LlavaForConditionalGeneration`; told apart by what the files hold.
        model_base: the language model (or LLaVA) that a LoRA or projector folder was trained over.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; the best there is by default.
        dtype: `float32`, `float16`, `bfloat16`; the checkpoint's own by default.
        load_8bit, load_4bit: quantize the language model with bitsandbytes while loading.
        device_map: `auto`, or accelerate's map of modules to devices, to spread the model over several GPUs;
            by default a model that one GPU can't hold is spread over all.
        vision_tower: folder or hub id in place of the config's `mm_vision_tower`; a tower inside the
            checkpoint goes before either.
        conversation_template: name of the prompt template, in place of the checkpoint's.

    Raises:
        LlavaError: what is missing, extra, misshapen or unreadable, and where; an adapter or a delta given as
            a whole model.
    """
    if load_8bit and load_4bit:
        raise LlavaError("load_8bit and load_4bit exclude each other; choose one")
    folder = locate_model(model_path)
    base_folder = None if model_base is None else locate_model(model_base, "base model", beside=folder)
    parts = open_checkpoint(folder, base_folder, vision_tower)
    if conversation_template:
        parts.config.conversation_template = conversation_template
    device = torch.device(device or best_device())
    dtype = choose_dtype(dtype, parts.config, parts.weights)
    # Before the weights: a tokenizer that can't be read is found out in a second.
    tokenizer = load_tokenizer(next((place for place in parts.folders if _has_tokenizer(place)), folder))
    add_missing_image_tokens(tokenizer, parts.config, folder)
    model = load_model(parts, device, dtype, 8 * load_8bit + 4 * load_4bit, device_map, attn_implementation)
    processor = load_image_processor([*parts.folders, parts.tower_folder], model)
    return LoadedModel(tokenizer, model, processor, context_length(parts.config))


def load_model(
    parts: Parts,
    device: torch.device,
    dtype: torch.dtype,
    bits: int = 0,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> LlavaForCausalLM:
    """The model of an opened checkpoint, filled and placed, in evaluation mode."""
    config = parts.config
    model = build_empty(model_class_of(config), config, attn_implementation)
    quantization_state = _prepare_quantized(parts, model, bits, dtype)
    placement = Placement(model, device, dtype, device_map, bits)
    fill_model(model, parts.sources(model), dtype, placement.device_of, quantization_state=quantization_state)
    if quantization_state is not None:
        finish_quantized(model)
    placement.dispatch(model)
    return model


def context_length(config: LlavaConfigFields) -> int:
    """Positions that the model was made for: `max_sequence_length` where the config has it."""
    return getattr(config, "max_sequence_length", None) or config.max_position_embeddings or 2048


def add_missing_image_tokens(tokenizer: PreTrainedTokenizerBase, config: LlavaConfigFields, folder: Path) -> None:
    """Give the tokenizer the image tokens that the config speaks of, if the vocabulary has rows for them.

    Raises:
        LlavaError: it has none; the tokenizer belongs to another model.
    """
    tokens = []
    if config.mm_image_token_scheme == SCHEME_PATCH:
        tokens.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if config.mm_use_im_start_end:
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    known = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in known]
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
    parts: Parts, model: LlavaForCausalLM, bits: int, dtype: torch.dtype
) -> dict[str, list[str]] | None:
    """Set the model up for 8 or 4 bits; the names of the stored quantization state, None if it isn't quantized."""
    if not parts.quantized:
        if not bits:
            return None
        prepare_quantized(model, quantization_config(bits, dtype), None)
        return {}
    _, quantization_state = split_quantization_state(parts.weights)
    stored = 8 if any(name.endswith(".SCB") for names in quantization_state.values() for name in names) else 4
    if bits and bits != stored:
        raise LlavaError(f"{parts.folders[0]}: the weights are stored in {stored} bits, not {bits}; drop the flag")
    prepare_quantized(model, quantization_config(stored, dtype), set(quantization_state))
    return quantization_state


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
