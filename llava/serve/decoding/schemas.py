"""Untrusted JSON schemas are compiled in processes of their own first, with limits on memory and time.

Two kilobytes of patterns can take a library hours and all memory, and it can't be stopped in a thread.
"""

import sys

from llava.errors import ImageError, LlavaError
from llava.serve.decoding.pool import DecodingPool

_PROGRAM = "from llava.serve.decoding.schema_process import main; main()"
SECONDS = 5.0
"""For one schema. One of 1500 optional fields takes 0.6 s, usual ones milliseconds."""
MEMORY = 64 << 20
"""Bytes that a process may take for a schema; the same 1500 fields take 13 MB."""


class SchemaPool:
    """`size` processes that compile schemas; see `llava.serve.decoding.pool.DecodingPool`."""

    def __init__(self, size: int = 2, seconds: float = SECONDS, memory: int = MEMORY, command: list[str] | None = None):
        self.pool = DecodingPool(size, seconds, memory, command or [sys.executable, "-c", _PROGRAM])

    def check(self, schema: str) -> None:
        """Returns once `schema` (JSON) was compiled within the limits; blocks.

        Raises:
            LlavaError: it isn't understood, or takes too long or too much memory.
            ServeError: CANCELLED or TIMEOUT of the request that this thread works for.
        """
        try:
            reply = self.pool.ask(schema.encode())
        except ImageError:
            raise LlavaError(
                "json_schema: it takes too long or too much memory to be compiled; give fewer or plainer patterns"
            ) from None
        if "error" in reply:
            raise LlavaError(str(reply["error"])[:500])

    def close(self) -> None:
        self.pool.close()
