"""Bodies of requests: bytes to checked values, in this order: counted, parsed, validated. Every error is a typed 400.

A JSON text is small compared with what it becomes: a million messages of one character are 10 MB of text, gigabytes as
objects, and nothing else runs in the process meanwhile. So its values are counted before it is parsed.
"""

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llava.errors import field_error
from llava.serve.protocol import ErrorType, ServeError

MOST_VALUES = 100_000
"""Opening brackets and commas, those inside of texts too."""
_LARGE = 1 << 20  # bytes; parsing so many takes milliseconds, which the event loop doesn't wait for

Checked = TypeVar("Checked", bound=BaseModel)


async def read_body(request: Any, model: type[Checked]) -> Checked:
    """The body of a starlette request as an instance of `model`; an empty body is an empty object.

    Raises:
        ServeError: BAD_REQUEST that names the field.
    """
    return validated(await read_json(request), model)


async def read_json(request: Any) -> dict[str, Any]:
    """The JSON object in the body of a starlette request.

    Raises:
        ServeError: BAD_REQUEST: no JSON, no object, too many values, a text that isn't Unicode.
    """
    content = await request.body()
    if len(content) < _LARGE:
        return parse_json(content)
    return await asyncio.to_thread(parse_json, content)


def parse_json(content: bytes) -> dict[str, Any]:
    """See `read_json`."""
    count = content.count(b",") + content.count(b"[") + content.count(b"{")
    if count > MOST_VALUES:
        raise _bad(f"The body has {count} JSON values or commas; at most {MOST_VALUES} are taken.")
    try:
        # NaN and Infinity aren't JSON; decoded first, since json would try other encodings.
        body = json.loads(content.decode(), parse_constant=_refuse_constant) if content else {}
    except (ValueError, RecursionError) as error:
        raise _bad("The body is not JSON.") from error
    if not isinstance(body, dict):
        raise _bad("The body is not a JSON object.")
    # Half of a surrogate pair can only come as an escape, and can't be written anywhere again.
    if b"\\u" in content:
        _check_texts(body)
    return body


def validated(body: Any, model: type[Checked]) -> Checked:
    """`body` as an instance of `model`.

    Raises:
        ServeError: BAD_REQUEST that names the field.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _bad(field_error(error)) from error


def _check_texts(body: dict[str, Any]) -> None:
    waiting: list[tuple[str, Any]] = [("", body)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                words = f"{name or 'a field name'}: the text has half of a surrogate pair at {error.start}"
                raise _bad(words) from error
        elif isinstance(value, dict):
            waiting += [("", key) for key in value]
            waiting += [(f"{name}.{ascii(key)[1:-1][:60]}" if name else ascii(key)[1:-1], value[key]) for key in value]
        elif isinstance(value, list):
            waiting += [(f"{name}.{place}", each) for place, each in enumerate(value)]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bad(words: str) -> ServeError:
    return ServeError(ErrorType.BAD_REQUEST, words)
