"""`load_pretrained_model`: any released layout to a model that runs, decided from what the files hold."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava.errors import LlavaError
from llava.model.assemble import Source, build_empty, fill_model, is_harmless
from llava.model.configuration import LlavaLlamaConfig, LlavaMistralConfig
from llava.model.language_model import MODEL_CLASSES
from llava.model.locate import locate_model
from llava.model.tokenizer import load_tokenizer
from llava.model.tower_files import CLIP_PREFIX, TOWER_PREFIX, is_behind_selection, read_vision_config, tower_source
from llava.model.weights import WeightFiles
from llava.records import read_json

log = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """What answering needs: `image_processor` turns pictures into the pixel values of this model's tower."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    image_processor: Any
    context_len: int


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    vision_tower: str | Path | None = None,
    conversation_template: str | None = None,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Load a LLaVA checkpoint from a folder or a hub id.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps`; the best there is by default.
        dtype: float32 on the CPU and the checkpoint's own elsewhere by default.
        vision_tower: folder or hub id to use in place of the config's `mm_vision_tower`.
        conversation_template: name of the prompt template, in place of the checkpoint's.

    Raises:
        LlavaError: whatever is missing, extra or misshapen, and where.
    """
    folder = locate_model(model_path)
    device = torch.device(device or best_device())
    config = read_config(folder)
    weights = WeightFiles.of_folder(folder)
    tower_inside = any(name.startswith(TOWER_PREFIX) for name in weights)
    tower_folder = _find_tower(config, folder, vision_tower, tower_inside)
    if conversation_template:
        config.conversation_template = conversation_template
    dtype = _dtype(dtype, config, device)
    model = build_empty(MODEL_CLASSES[config.model_type], config, attn_implementation)
    sources = [] if tower_inside else [tower_source(tower_folder, model)]
    sources.append(_native_source(weights, model))
    fill_model(model, sources, dtype, device)
    tokenizer = load_tokenizer(folder)
    processor = load_image_processor(folder, tower_folder, model)
    return LoadedModel(tokenizer, model, processor, context_length(config))


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def context_length(config) -> int:
    """Positions that the model was made for: `max_sequence_length` where the config has it."""
    return getattr(config, "max_sequence_length", None) or config.max_position_embeddings or 2048


def read_config(folder: Path) -> LlavaLlamaConfig | LlavaMistralConfig:
    """The configuration of a native checkpoint, old spellings translated."""
    content = read_json(folder / "config.json")
    config_class = LlavaMistralConfig if content["model_type"] == "llava_mistral" else LlavaLlamaConfig
    return config_class.from_dict(content | {"model_type": config_class.model_type})


def load_image_processor(folder: Path, tower_folder: Path | None, model: PreTrainedModel) -> Any:
    """The image processor saved with the checkpoint, or the tower's, or CLIP's for the tower's size."""
    try:
        from llava.images import ImageProcessor
    except ImportError:
        return None

    for place in (folder, tower_folder):
        if place is not None and (place / "preprocessor_config.json").is_file():
            return ImageProcessor.from_pretrained(place)
    size = model.get_vision_tower().image_size
    return ImageProcessor.from_pretrained({"size": size, "crop_size": size})


def _native_source(weights: WeightFiles, model: PreTrainedModel) -> Source:
    names, unused = {}, set()
    for name in weights:
        if name.startswith(CLIP_PREFIX) and is_behind_selection(name.removeprefix(CLIP_PREFIX), model):
            unused.add(name)
        elif not is_harmless(name):
            names[name] = name
    return Source("checkpoint", weights, names, frozenset(unused))


def _find_tower(config, folder: Path, override, inside: bool) -> Path | None:
    """The tower's folder; fills `config.mm_vision_config` from it where the checkpoint has none."""
    name = override or config.mm_vision_tower
    if inside and config.mm_vision_config:
        return None
    if not name:
        raise LlavaError(f"{folder / 'config.json'}: has no mm_vision_tower; is this a LLaVA checkpoint?")
    tower_folder = locate_model(name, "vision tower", beside=folder)
    config.mm_vision_config = read_vision_config(tower_folder)
    return tower_folder


def _dtype(dtype, config, device: torch.device) -> torch.dtype:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise LlavaError("dtype must be float32, float16 or bfloat16")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else config.dtype or torch.float16
    return dtype
