"""Coroutines that wait, run at once: where all of them wait, the clock goes on to when the first of them is due."""

import asyncio
from collections.abc import Coroutine


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop for code that waits for time alone: with connections open, their timeouts would be due at once."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


def run_skipping(main: Coroutine):
    """asyncio.run in a SkippingLoop."""
    loop = SkippingLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()
