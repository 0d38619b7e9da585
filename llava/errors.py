"""The one kind of error that a user is meant to read (images have their own), and the message for a missing extra."""

import contextlib
import importlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

MOST_LINE = 2000
_STEERING = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


class LlavaError(Exception):
    """Bad input. The text says what was wrong, where, and what to do; commands print it and exit with 2.

    It is one line, whatever a file that it quotes holds.
    """

    def __init__(self, *words: Any):
        super().__init__(*(one_line(" ".join(word.split("\n"))) if isinstance(word, str) else word for word in words))


class ImageError(LlavaError):
    """An image that can't be read, or may not be: damaged, too large, of no known kind. Never holds its content."""


@contextlib.contextmanager
def library_errors(words: str) -> Iterator[None]:
    """Whatever a library raises within, about a file of the user's, becomes a LlavaError: `words`, and its reason."""
    try:
        yield
    except LlavaError:
        raise
    except BaseException as error:
        # A panic of a library written in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LlavaError(f"{words} ({one_line(str(error) or type(error).__name__, 300)})") from error


def amount(count: int, one: str, many: str = "") -> str:
    """A count and what it is of, for messages: `1 record`, `2,000 records`; `many` where it isn't `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def one_line(text: str, most: int = MOST_LINE) -> str:
    """`text` without characters that move a terminal's cursor or end a line; of a long one `most` characters, from its
    beginning and its end."""
    cut = f" … ({len(text)} characters) … "
    kept = text if len(text) <= most else text[: most // 2] + cut + text[-(most // 2) :]
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in kept)


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says that isn't blank; its kind, where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def for_terminal(text: str) -> str:
    """`text` in its lines, with escapes for the characters that steer a terminal: a model may answer anything."""
    return _STEERING.sub(lambda match: ascii(match[0])[1:-1], text)


def field_error(error: Any, show_value: bool = False) -> str:
    """The first complaint of a pydantic ValidationError in one line that begins with the field: "n: Input should …".

    `show_value` adds what was given, for whoever gave it on the same machine.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    # A field's name may be a client's own invention.
    where = ".".join(ascii(part)[1:-1][:60] if isinstance(part, str) else str(part) for part in first["loc"])
    given = f" is {first['input']!r:.100}" if show_value and where else ""
    return f"{where}{given}: {first['msg']}" if where else first["msg"]


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise a LlavaError that names the pip extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LlavaError(
            f'this needs the package "{module.split(".")[0]}" ({error}); '
            f'install it with: pip install "llava-med[{extra}]"'
        ) from error
