"""LLaVA-Med: assistants that look at medical images and talk about them. For research only.

The public names are loaded on first use, so that `import llava` needs neither torch nor time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "2.0.0"

_PUBLIC = {
    "Assistant": "llava.assistant",
    "Conversation": "llava.conversation",
    "Engine": "llava.generation",
    "LlavaError": "llava.errors",
    "LlavaLlamaForCausalLM": "llava.model",
    "LlavaMistralForCausalLM": "llava.model",
    "conv_templates": "llava.conversation",
    "load": "llava.assistant",
    "load_pretrained_model": "llava.model",
    "open_image": "llava.images",
}

__all__ = [
    "Assistant",
    "Conversation",
    "Engine",
    "LlavaError",
    "LlavaLlamaForCausalLM",
    "LlavaMistralForCausalLM",
    "__version__",
    "conv_templates",
    "load",
    "load_pretrained_model",
    "open_image",
]

if TYPE_CHECKING:
    from llava.assistant import Assistant, load
    from llava.conversation import Conversation, conv_templates
    from llava.errors import LlavaError
    from llava.generation import Engine
    from llava.images import open_image
    from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, load_pretrained_model


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llava' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
