"""What a server does again and again beside its requests."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def repeating(seconds: float, *works: Callable[[], Any]) -> AsyncIterator[None]:
    """As long as the block lasts, each of `works` is done every `seconds` in the event loop.

    What one raises is logged, and it is done again the next time.

    Args:
        works: functions and coroutine functions without arguments.
    """
    task = asyncio.create_task(_repeat(seconds, works))
    try:
        yield
    finally:
        task.cancel()


async def _repeat(seconds: float, works: tuple[Callable[[], Any], ...]) -> None:
    while True:
        await asyncio.sleep(seconds)
        for work in works:
            try:
                doing = work()
                if asyncio.iscoroutine(doing):
                    await doing
            except Exception:
                logger.exception("%s failed; it is tried again in %g s", work.__qualname__, seconds)
