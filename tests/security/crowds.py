"""Clients in great numbers: ones that stream, that send slowly, that leave, that send anything at all."""

import asyncio
import contextlib
import random

import aiohttp

from tests.security.wire import Said
from tests.serve.streams import StreamError, events


async def stream(session: aiohttp.ClientSession, url: str, question: dict) -> str:
    """The whole text of a streamed answer, or the type of the error."""
    async with session.post(url, json=question) as reply:
        if reply.status != 200:
            return (await reply.json())["error"]["type"]
        text = ""
        try:
            async for event in events(reply):
                text += event["choices"][0]["delta"].get("content") or ""
        except StreamError as error:
            return error.kind
        return text


async def leave(session: aiohttp.ClientSession, url: str, **request) -> int:
    """Wait for the first words of an answer, then go; the answer's status."""
    async with session.post(url, **request) as reply:
        await reply.content.readany()
        reply.close()
        return reply.status


async def drip(port: int, first: bytes, more: bytes) -> str | None:
    """A byte every second, until the server has had enough; the type of its error."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        writer.write(first)
        while not reading.done():
            await writer.drain()
            await asyncio.wait([reading], timeout=1.0)
            writer.write(more)
    return (await _said(reading, writer)).error


async def babble(port: int, dice: random.Random, seconds: float) -> str | None:
    """Bytes that are no request, or the beginning of one; the type of the server's error, "nothing" if it said nothing
    within `seconds` or before it closed, None if its words have no type."""
    content = dice.randbytes(dice.randint(1, 5000))
    starts = (b"", b"GET /health HTTP/1.1\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        writer.write(dice.choice(starts) + content)
        await writer.drain()
        await asyncio.wait([reading], timeout=seconds)
    if not reading.done():
        reading.cancel()
    said = await _said(reading, writer)
    return said.error if said.content else "nothing"


async def _said(reading: asyncio.Task, writer: asyncio.StreamWriter) -> Said:
    writer.close()
    with contextlib.suppress(ConnectionError, asyncio.CancelledError):
        return Said(await reading, True)
    return Said(b"", True)
