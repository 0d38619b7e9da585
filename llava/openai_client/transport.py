"""How a language-model server is reached: no redirects, nothing compressed, replies of a size that memory can hold."""

from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

from llava.errors import require

MOST_REPLY, MOST_STREAM, MOST_FILE = 8 << 20, 256 << 20, 2 << 30
"""Bytes of a reply, of one that comes piece by piece, and of a file of the Batch API, each line of which is a reply.

JSON that is read takes up to 28 times its bytes.
"""
MOST_EVENT = 1 << 20
"""Bytes of one piece."""
_MOST_TOKENS = 10**9
"""That a server may count for one request."""
_ENDS = (b"\n\n", b"\r\r", b"\r\n\r\n")


def http_client(timeout: float, most: int = MOST_REPLY) -> Any:
    """The openai package's HTTP client for a server that may send anything.

    A request goes to the address that was named alone: it holds images and a key. A reply that is compressed, or
    larger than `most` (`MOST_STREAM` for one in pieces), is an error of httpx, as a connection that breaks is.
    """
    openai = require("openai", "openai")
    # httpx, or httpx2 since the package's third release.
    base = next(one for one in openai.DefaultAsyncHttpxClient.__mro__ if one.__name__ == "AsyncClient")
    httpx = import_module(base.__module__.partition(".")[0])

    class Capped(httpx.AsyncByteStream):  # type: ignore[name-defined]  # of whichever of the two
        def __init__(self, stream: Any, in_pieces: bool):
            self.stream, self.in_pieces = stream, in_pieces

        async def __aiter__(self) -> AsyncIterator[bytes]:
            cap, total, event, tail = MOST_STREAM if self.in_pieces else most, 0, 0, b""
            async for chunk in self.stream:
                total += len(chunk)
                if self.in_pieces:
                    recent = tail + chunk
                    end = max(recent.rfind(mark) for mark in _ENDS)
                    event, tail = event + len(chunk) if end < 0 else len(recent) - end, recent[-3:]
                if total > cap or event > MOST_EVENT:
                    raise httpx.ReadError(f"the reply is larger than {cap if total > cap else MOST_EVENT:,} bytes")
                yield chunk

        async def aclose(self) -> None:
            await self.stream.aclose()

    async def check(response: Any) -> None:
        if "content-encoding" in response.headers:
            raise httpx.ReadError("the reply is compressed, though nothing compressed was asked for")
        in_pieces = response.headers.get("content-type", "").startswith("text/event-stream")
        response.stream = Capped(response.stream, in_pieces)

    return openai.DefaultAsyncHttpxClient(
        timeout=timeout,
        follow_redirects=False,
        headers={"accept-encoding": "identity"},
        event_hooks={"response": [check]},
    )


def token_count(told: Any) -> int:
    """A number of tokens as a server tells it; 0 for what it doesn't tell, or can't be."""
    return told if isinstance(told, int) and 0 <= told <= _MOST_TOKENS else 0
