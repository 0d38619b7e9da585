"""The engine that turns (conversation, pictures, sampling) into text: batched, streaming, continuous."""

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "Answer": "messages",
    "ContextTooLong": "messages",
    "Engine": "engine",
    "EngineBusy": "messages",
    "Look": "look",
    "OutOfMemory": "messages",
    "Piece": "messages",
    "Request": "messages",
    "SamplingParams": "messages",
    "Ticket": "engine",
    "TokenLogprob": "messages",
}

__all__ = [
    "Answer",
    "ContextTooLong",
    "Engine",
    "EngineBusy",
    "Look",
    "OutOfMemory",
    "Piece",
    "Request",
    "SamplingParams",
    "Ticket",
    "TokenLogprob",
]

if TYPE_CHECKING:
    from llava.generation.engine import Engine, Ticket
    from llava.generation.look import Look
    from llava.generation.messages import (
        Answer,
        ContextTooLong,
        EngineBusy,
        OutOfMemory,
        Piece,
        Request,
        SamplingParams,
        TokenLogprob,
    )


def __getattr__(name: str):
    # Sampling parameters and errors are read by servers that don't load torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llava.generation' has no attribute {name!r}")
    value = getattr(import_module(f"llava.generation.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
