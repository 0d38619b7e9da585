"""The multimodal model: tower, projector, language model, and every layout its checkpoints come in."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "LlavaConfig": "families",
    "LlavaLlamaConfig": "families",
    "LlavaLlamaForCausalLM": "families",
    "LlavaMistralConfig": "families",
    "LlavaMistralForCausalLM": "families",
    "LoadedModel": "loader",
    "add_image_tokens": "build",
    "build_model_from_llm": "build",
    "load_pretrained_model": "loader",
    "load_tokenizer": "tokenizer",
    "save_model": "saver",
}

__all__ = [
    "LlavaConfig",
    "LlavaLlamaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LoadedModel",
    "add_image_tokens",
    "build_model_from_llm",
    "load_pretrained_model",
    "load_tokenizer",
    "save_model",
]

if TYPE_CHECKING:
    from llava.model.build import add_image_tokens, build_model_from_llm
    from llava.model.families import (
        LlavaConfig,
        LlavaLlamaConfig,
        LlavaLlamaForCausalLM,
        LlavaMistralConfig,
        LlavaMistralForCausalLM,
    )
    from llava.model.loader import LoadedModel, load_pretrained_model
    from llava.model.saver import save_model
    from llava.model.tokenizer import load_tokenizer


def __getattr__(name: str) -> Any:
    # Commands of this package answer --help without importing torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llava.model' has no attribute {name!r}")
    value = getattr(import_module(f"llava.model.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
