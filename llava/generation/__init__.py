"""The engine that turns (conversation, images, sampling) into text: batched, streaming, continuous."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava.sampling_params import SamplingParams

_PUBLIC = {
    "Answer": "types",
    "ContextTooLong": "types",
    "Engine": "engine",
    "EngineBusy": "types",
    "AttentionMap": "attention_map",
    "OutOfMemory": "types",
    "Piece": "types",
    "Request": "types",
    "Handle": "engine",
    "TokenLogprob": "types",
}

__all__ = [
    "Answer",
    "AttentionMap",
    "ContextTooLong",
    "Engine",
    "EngineBusy",
    "Handle",
    "OutOfMemory",
    "Piece",
    "Request",
    "SamplingParams",
    "TokenLogprob",
]

if TYPE_CHECKING:
    from llava.generation.attention_map import AttentionMap
    from llava.generation.engine import Engine, Handle
    from llava.generation.types import (
        Answer,
        ContextTooLong,
        EngineBusy,
        OutOfMemory,
        Piece,
        Request,
        TokenLogprob,
    )


def __getattr__(name: str) -> Any:
    # Errors and requests are read by commands that don't load torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llava.generation' has no attribute {name!r}")
    value = getattr(import_module(f"llava.generation.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
