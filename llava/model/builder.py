"""`load_pretrained_model` with LLaVA's arguments, for tools that were written for LLaVA."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.errors import LlavaError
from llava.model import loader
from llava.model.loader import LoadedModel
from llava.model.weights.placement import best_device
from llava.records import read_json

log = logging.getLogger(__name__)


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | torch.device | Mapping[str, Any] | None = "auto",
    device: str | torch.device = "cuda",
    use_flash_attn: bool = False,
    *,
    torch_dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    customized_config: str | Path | None = None,
    multimodal: bool = True,
    **options: Any,
) -> LoadedModel:
    """(tokenizer, model, image processor, context length) of a checkpoint; see `llava.model.load_pretrained_model`.

    Args:
        model_name: decides nothing; what a checkpoint is stands in its files.
        device_map: `auto`, a device's name, `{"": device}`, or accelerate's map of modules.
        device: `cuda` is the best device there is where there is no GPU.
        use_flash_attn: the same as `attn_implementation="flash_attention_2"`.
        customized_config: a config.json whose LLaVA fields (`mm_*`, `image_*`, `conversation_template`) take the place
            of the checkpoint's.
        multimodal: every model here is.
        options: the other options of `llava.model.load_pretrained_model`.
    """
    if use_flash_attn and attn_implementation is None:
        attn_implementation = "flash_attention_2"
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map not in (None, "auto") and not isinstance(device_map, Mapping):
        device, device_map = torch.device(device_map), None
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device(best_device())
        log.warning("there is no GPU; the model is loaded on %s", device)
    return loader.load_pretrained_model(
        model_path,
        model_base,
        device=device,
        dtype=torch_dtype,
        load_8bit=load_8bit,
        load_4bit=load_4bit,
        device_map=None if device_map is None or device.type != "cuda" else device_map,  # type: ignore[arg-type]
        attn_implementation=attn_implementation,
        config_fields=_llava_fields(customized_config),
        **options,
    )


def _llava_fields(path: str | Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise LlavaError(f"{path}: expected an object with fields of a LLaVA config")
    return {name: value for name, value in content.items() if name.startswith(("mm_", "image_", "conversation_"))}
