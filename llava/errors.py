"""The one kind of error that a user is meant to read (images have their own), and the message for a missing extra."""

import importlib
from types import ModuleType


class LlavaError(Exception):
    """Bad input. The text says what was wrong, where, and what to do; commands print it and exit with 2."""


class ImageError(LlavaError):
    """An image that can't be read, or may not be: damaged, too large, of no known kind. Never holds its content."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise a LlavaError that names the pip extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LlavaError(
            f'this needs the package "{module.split(".")[0]}" ({error}); '
            f'install it with: pip install "llava-med[{extra}]"'
        ) from error
