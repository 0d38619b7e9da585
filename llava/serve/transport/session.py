"""How our servers and tools ask each other: one aiohttp session each, with the same settings."""

from typing import Any

from llava.serve.protocol import KEEP_ALIVE_SECONDS
from llava.serve.secret import headers

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 600.0
"""Between two pieces of an answer, or for one that comes whole; the worker's own limit comes first."""
MOST_SHORT = 4 << 20
"""Bytes of a reply that tells how a server is."""


def open_session(secret: str | None, read_timeout: float) -> Any:
    """An `aiohttp.ClientSession` of the running event loop; close it with `await session.close()`.

    It sends the secret, keeps no cookies and asks no proxy. Give `allow_redirects=False` with each request: the
    secret goes nowhere but to the address that was meant.

    Args:
        read_timeout: seconds between two pieces of an answer.
    """
    import aiohttp

    # An idle connection is dropped here well before the server closes it, so that none is used that has just gone.
    return aiohttp.ClientSession(
        headers={"accept-encoding": "identity", **headers(secret)},
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS / 3),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=read_timeout),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    )


async def read_reply(reply: Any, most: int = MOST_SHORT) -> bytes:
    """The whole body of an aiohttp response.

    Raises:
        aiohttp.ClientPayloadError: it has more than `most` bytes; others of aiohttp's where it breaks off.
    """
    import aiohttp

    body = bytearray()
    async for part in reply.content.iter_any():
        body += part
        if len(body) > most:
            reply.close()
            raise aiohttp.ClientPayloadError(f"the reply has more than {most:,} bytes")
    return bytes(body)
