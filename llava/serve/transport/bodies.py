"""Bodies of requests: bytes to checked values, in this order: counted, parsed, validated. Every error is a typed 400.
And values to bytes, for the next server.

A JSON text is small compared with what it becomes: a million messages of one character are 10 MB of text, gigabytes as
objects, and nothing else runs in the process meanwhile. So its values are counted before it is parsed.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from llava.errors import field_error
from llava.serve.protocol import ErrorType, ServeError

JSON_HEADERS = {"content-type": "application/json"}
MOST_VALUES = 100_000
"""Opening brackets and commas, those inside of texts too."""
_PART = 256 << 10  # characters
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
        # Not the standard library's: it holds the interpreter several times as long, takes NaN, and texts that hold
        # half of a surrogate pair, which can't be written anywhere again.
        body = from_json(content, allow_inf_nan=False) if content else {}
    except ValueError as error:
        raise _bad(f"The body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise _bad("The body is not a JSON object.")
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


def written(value: Any) -> bytes | AsyncIterator[bytes]:
    """A JSON value as the body of a request to another server: what aiohttp takes as `data`.

    A long one is written in parts, between which the event loop goes on: images of 60 MB take half a second.
    """
    parts = _gathered(_parts(value))
    first = next(parts)
    second = next(parts, None)
    return first if second is None else _in_turns(first, second, parts)


async def _in_turns(first: bytes, second: bytes, rest: Iterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    yield second
    for part in rest:
        yield part
        await asyncio.sleep(0)


def _gathered(pieces: Iterator[str]) -> Iterator[bytes]:
    waiting: list[str] = []
    length = 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length >= _PART:
            yield "".join(waiting).encode()
            waiting, length = [], 0
    yield "".join(waiting).encode()


def _parts(value: Any) -> Iterator[str]:
    """JSON in order; a character is written the same wherever a text is cut."""
    if isinstance(value, str) and len(value) > _PART:
        yield '"'
        for start in range(0, len(value), _PART):
            yield json.dumps(value[start : start + _PART])[1:-1]
        yield '"'
    elif isinstance(value, (dict, list)) and value:
        named = value.items() if isinstance(value, dict) else ((None, each) for each in value)
        mark, end = "{}" if isinstance(value, dict) else "[]"
        for name, each in named:
            # Names are texts in JSON; a bias's are ids.
            yield mark if name is None else f"{mark}{json.dumps(str(name))}:"
            yield from _parts(each)
            mark = ","
        yield end
    else:
        yield json.dumps(value)


def _bad(words: str) -> ServeError:
    return ServeError(ErrorType.BAD_REQUEST, words)
