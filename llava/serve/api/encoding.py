"""Replies and events as JSON. Long ones are made beside the event loop: sixteen answers with the likeliest other tokens
are 10 MB, and whoever else asks would wait for as long as it takes to write them."""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from llava.serve.protocol import MOST_ENTRIES

_thread = ThreadPoolExecutor(1, "llava-replies")
"""One: the event loop then shares the interpreter with no more than that."""
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


async def beside_loop(
    is_long: bool, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """`function(…)`, in a thread if it `is_long`."""
    if not is_long:
        return function(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_thread, lambda: function(*args, **kwargs))


def is_long(value: Any) -> bool:
    """Whether a list anywhere in it, that isn't itself inside of such a list, has more than `MOST_ENTRIES`."""
    if isinstance(value, list):
        return len(value) > MOST_ENTRIES or any(map(is_long, value))
    return isinstance(value, dict) and any(map(is_long, value.values()))


def encoded(value: Any) -> bytes:
    """A reply as JSON; long lists in slices, between which other threads come to their turn.

    Raises:
        ValueError: a number that JSON doesn't have.
    """
    return "".join(_pieces(value)).encode()


def _pieces(value: Any) -> Iterator[str]:
    if not is_long(value):
        yield _text(value)
    elif isinstance(value, dict):
        for place, (name, each) in enumerate(value.items()):
            yield f"{',' if place else '{'}{_text(name)}:"
            yield from _pieces(each)
        yield "}"
    elif len(value) > MOST_ENTRIES:
        for start in range(0, len(value), MOST_ENTRIES):
            yield ("," if start else "[") + _text(value[start : start + MOST_ENTRIES])[1:-1]
        yield "]"
    else:
        for place, each in enumerate(value):
            yield "," if place else "["
            yield from _pieces(each)
        yield "]"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
