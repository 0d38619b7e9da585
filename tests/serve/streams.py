"""Streamed answers of the API as clients read them."""

import json
from collections.abc import AsyncIterator

import aiohttp


class StreamError(Exception):
    """A stream that ended in an error: `kind` is its type, or "broken off" if it just stopped."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


async def events(reply: aiohttp.ClientResponse) -> AsyncIterator[dict]:
    """The events of a streamed answer, which has to end as one does.

    Raises:
        StreamError: it ended otherwise.
    """
    is_whole = False
    async for line in reply.content:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise StreamError(event["error"]["type"])
            yield event
        is_whole = is_whole or line.startswith(b"data: [DONE]")
    if not is_whole:
        raise StreamError("broken off")
