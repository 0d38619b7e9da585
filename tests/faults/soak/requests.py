"""What the soak's clients ask: each kind of request, and what has to come of it.

A kind returns if all went well. Else it raises: `Again` where the answer says that asking again helps, `Lost` for
anything but the right answer.
"""

import base64
import functools
import io
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import numpy as np
from PIL import Image

from llava.retries import retry_after
from tests.faults.soak.stack import KEY, MODEL, Stack
from tests.security.crowds import leave
from tests.security.image_bombs import dicom, element, image_module, nifti
from tests.serve.streams import StreamError, events

AGAIN = {"queue_full", "server_busy", "too_many_connections"}
HEADERS = {"authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "DICOM", "NIfTI")
QUESTIONS = 200  # some are asked many times, others once
LARGE_SIDE = 2600
"""Of an image that takes 20 MB as it is, 27 MB as text."""


class Lost(Exception):
    """The request wasn't answered as it has to be; `kind` is the error's type, or what else came."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


class Again(Exception):
    """Not now: ask again after `seconds`."""

    def __init__(self, kind: str, seconds: float):
        super().__init__(kind)
        self.kind, self.seconds = kind, seconds


@dataclass(frozen=True)
class Kind:
    """A kind of request; `weight` is its share of all, and `is_refused` whether an error is the right answer."""

    name: str
    weight: float
    ask: Callable[["Client", random.Random], Awaitable[None]]
    is_refused: bool = False


class Client:
    """All the clients of the API: connections are shared, as those of a busy program's."""

    def __init__(self, stack: Stack):
        self.stack = stack
        self.session = aiohttp.ClientSession(
            stack.url("api"),
            headers=HEADERS,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=400),
        )

    async def close(self) -> None:
        await self.session.close()

    async def ask(self, body: dict) -> None:
        """A well-formed question: as many tokens have to come as were asked for."""
        async with self.session.post(CHAT, json=body) as reply:
            await _expect_ok(reply)
            if body.get("stream"):
                tokens = 0
                async for event in events(reply):
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            else:
                tokens = (await reply.json())["usage"]["completion_tokens"]
        if tokens != body["max_tokens"]:
            raise Lost(f"{tokens} tokens in place of {body['max_tokens']}")


async def _expect_ok(reply: aiohttp.ClientResponse) -> None:
    if reply.status == 200:
        return
    kind = (await reply.json())["error"]["type"]
    if kind in AGAIN:
        raise Again(kind, retry_after(reply.headers, 60.0) or 1.0)
    raise Lost(kind)


def question(dice: random.Random, *images: str, stream: bool = False) -> dict:
    number = dice.randrange(QUESTIONS) if dice.random() < 0.5 else dice.randrange(10**9)
    parts: list[dict] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    parts.append({"type": "text", "text": f"Is there a nodule in picture {number}?"})
    body = {"model": MODEL, "messages": [{"role": "user", "content": parts}]}
    body |= {"max_tokens": dice.randint(4, 24), "ignore_eos": True, "temperature": dice.choice([0, 0.7])}
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


@functools.lru_cache(maxsize=512)
def image_bytes(kind: str, number: int) -> bytes:
    """A small picture of noise; `number` tells it from others."""
    values = np.random.default_rng(number).integers(0, 255, (40 + number, 50, 3), np.uint8)
    if kind == "DICOM":
        rows, columns = values.shape[:2]
        pixels = element(0x7FE0, 0x10, b"OB", values[..., 0].tobytes())
        return dicom("1.2.840.10008.1.2.1", image_module(rows, columns) + pixels)
    if kind == "NIfTI":
        return nifti((20 + number, 21, 8))
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def image(dice: random.Random) -> str:
    return data_url(image_bytes(dice.choice(FORMATS), dice.randrange(40)))


def data_url(content: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(content).decode()


@functools.cache
def large_image() -> str:
    """Near the cap of a body, and as noise not to be packed."""
    values = np.random.default_rng(0).integers(0, 255, (LARGE_SIDE, LARGE_SIDE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "BMP")
    return data_url(buffer.getvalue())


async def text(client: Client, dice: random.Random) -> None:
    await client.ask(question(dice))


async def text_streamed(client: Client, dice: random.Random) -> None:
    await client.ask(question(dice, stream=True))


async def with_image(client: Client, dice: random.Random) -> None:
    await client.ask(question(dice, image(dice)))


async def with_images_streamed(client: Client, dice: random.Random) -> None:
    await client.ask(question(dice, *(image(dice) for _ in range(dice.randint(1, 4))), stream=True))


async def with_large_body(client: Client, dice: random.Random) -> None:
    await client.ask(question(dice, large_image()))


async def several_choices(client: Client, dice: random.Random) -> None:
    body = question(dice) | {"n": 3, "max_tokens": 8}
    async with client.session.post(CHAT, json=body) as reply:
        await _expect_ok(reply)
        content = await reply.json()
    if len(content["choices"]) != 3 or content["usage"]["completion_tokens"] != 24:
        raise Lost("not three whole choices")


async def leaving(client: Client, dice: random.Random) -> None:
    body = question(dice, stream=True) | {"max_tokens": 200}
    status = await leave(client.session, CHAT, json=body)
    if status != 200:
        raise (Again("queue_full", 1.0) if status == 429 else Lost(f"status {status}"))


def _refusals() -> list[tuple[int, str, dict]]:
    """(status, error type, what is sent) of requests that aren't right."""
    well = question(random.Random(0))
    long = {"messages": [{"role": "user", "content": "yes " * 3000}]}
    far = {"messages": question(random.Random(0), "http://127.0.0.1:9/x.png")["messages"]}
    broken = {"messages": question(random.Random(0), data_url(b"no image"))["messages"]}
    return [
        (400, "bad_request", {"data": b'{"model": '}),
        (400, "bad_request", {"data": b"[" * 5000}),
        (400, "bad_request", {"json": well | {"temperature": "warm"}}),
        (400, "bad_request", {"json": well | {"nobody_knows": 1}}),
        (400, "bad_request", {"data": b'{"messages": [' + b"{}," * 200_000 + b"{}]}"}),
        (400, "bad_image", {"json": well | far}),
        (400, "bad_image", {"json": well | broken}),
        (400, "bad_image", {"json": well | broken | {"stream": True}}),
        (400, "context_too_long", {"json": well | long}),
        (404, "model_not_found", {"json": well | {"model": "another"}}),
        (401, "unauthorized", {"json": well, "headers": {"authorization": "Bearer wrong"}}),
        (403, "foreign_origin", {"json": well, "headers": {"origin": "http://elsewhere.example"}}),
        (421, "unknown_host", {"json": well, "headers": {"host": "elsewhere.example"}}),
        (431, "headers_too_large", {"json": well, "headers": {f"x-{number}": "1" for number in range(150)}}),
    ]


REFUSALS = _refusals()


async def refused(client: Client, dice: random.Random) -> None:
    status, kind, sent = dice.choice(REFUSALS)
    async with client.session.post(CHAT, **sent) as reply:
        content = await reply.json()
    if (reply.status, content["error"]["type"]) != (status, kind):
        if content["error"]["type"] in AGAIN:
            raise Again(content["error"]["type"], 1.0)
        raise Lost(f"{reply.status} {content['error']['type']} in place of {status} {kind}")


async def well(ask: Awaitable[None]) -> None:
    """`ask`, with every way of not being answered as `Lost`."""
    try:
        await ask
    except StreamError as error:
        raise (Again(error.kind, 1.0) if error.kind in AGAIN else Lost(error.kind)) from error
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        raise Lost(f"{type(error).__name__}: {str(error)[:80]}") from error
