"""The answers of one request to the API: `n` requests to workers, whole or as they grow."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.serve.api.metrics import Metrics
from llava.serve.client import ServingClient, answer_text

MOST_UNREAD = 16
"""Steps of a request that wait for its client, each with the text so far; then its workers wait too."""
COPIES_BYTES = 64 << 20
"""Of a request's body, which workers get once for each of its choices: with more than these, one after another."""


@dataclass
class Choice:
    """One of the answers, as far as it has come."""

    index: int
    text: str = ""
    """Of an answer to messages without the blanks that templates leave before it."""
    delta: str = ""
    """What the last step added."""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Of the whole answer, or in a stream of the last step."""
    finish_reason: str | None = None
    usage: dict[str, int] | None = None

    @property
    def is_whole(self) -> bool:
        return self.finish_reason is not None


class Choices:
    """Asks the workers with `bodies` (llava.serve.job's requests), each of about `size` bytes."""

    def __init__(self, client: ServingClient, bodies: Sequence[dict[str, Any]], metrics: Metrics, size: int = 0):
        self.client, self.bodies, self.metrics = client, bodies, metrics
        self.turns = asyncio.Semaphore(max(1, COPIES_BYTES // max(1, size)))
        self.began = time.monotonic()
        self.said_something = False

    async def whole(self) -> list[Choice]:
        """All answers, in their order.

        Raises:
            ServeError: one of them failed; the others are given up.
        """
        with self.metrics.in_flight.track_inprogress():
            tasks = [asyncio.create_task(self._collect(index)) for index in range(len(self.bodies))]
            try:
                choices = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        self.metrics.finished(sum_usage(choices), time.monotonic() - self.began)
        return choices

    async def steps(self) -> AsyncGenerator[Choice, None]:
        """Each answer whenever it has grown, the last time with its `finish_reason`.

        Raises:
            ServeError: see `whole`.
        """
        queue: asyncio.Queue[Choice | BaseException] = asyncio.Queue()
        room = asyncio.Semaphore(MOST_UNREAD)
        whole: list[Choice] = []
        with self.metrics.in_flight.track_inprogress():
            tasks = [asyncio.create_task(self._feed(index, queue, room)) for index in range(len(self.bodies))]
            for task in tasks:
                task.add_done_callback(lambda done: _pass_on(done, queue))
            try:
                while len(whole) < len(self.bodies):
                    choice = await queue.get()
                    if isinstance(choice, BaseException):
                        raise choice
                    room.release()
                    if choice.is_whole:
                        whole.append(choice)
                    yield choice
            finally:
                for task in tasks:
                    task.cancel()
        self.metrics.finished(sum_usage(whole), time.monotonic() - self.began)

    async def _collect(self, index: int) -> Choice:
        logprobs: list[dict[str, Any]] = []
        choice = Choice(index)
        async for choice in self._growing(index):
            logprobs += choice.logprobs
        choice.logprobs = logprobs
        return choice

    async def _feed(self, index: int, queue: asyncio.Queue, room: asyncio.Semaphore) -> None:
        async for choice in self._growing(index):
            await room.acquire()
            queue.put_nowait(choice)

    async def _growing(self, index: int) -> AsyncIterator[Choice]:
        said = ""
        async with self.turns, contextlib.aclosing(self.client.generate(self.bodies[index])) as chunks:
            async for chunk in chunks:
                if chunk["text"] and not self.said_something:
                    self.said_something = True
                    self.metrics.first_token.observe(time.monotonic() - self.began)
                text = answer_text(chunk["text"], self.bodies[index])
                delta, said = text[len(said) :], text
                reason, usage = chunk.get("finish_reason"), chunk.get("usage")
                yield Choice(index, text, delta, chunk.get("logprobs") or [], reason, usage)


def sum_usage(choices: Sequence[Choice]) -> dict[str, int]:
    """`prompt_tokens`, `completion_tokens` and `cached_tokens` of all choices: the prompt is counted once."""
    usages = [choice.usage or {} for choice in choices]
    return {
        "prompt_tokens": max((usage.get("prompt_tokens", 0) for usage in usages), default=0),
        "completion_tokens": sum(usage.get("completion_tokens", 0) for usage in usages),
        "cached_tokens": max((usage.get("cached_tokens", 0) for usage in usages), default=0),
    }


def time_of_day() -> int:
    """Seconds since 1970, as a reply says when it was made."""
    return int(time.time())  # noqa: TID251


def _pass_on(done: asyncio.Task, queue: asyncio.Queue) -> None:
    """Hand a failed task's exception to whoever reads the queue."""
    if not done.cancelled() and (error := done.exception()) is not None:
        queue.put_nowait(error)
