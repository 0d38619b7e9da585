"""Between the engine's thread and the event loop: pieces of answers, and the stream of chunks made of them.

The engine puts a piece per token; a chunk goes out at most every `interval` seconds, or writing JSON would take more
of the processor than the model does. The first and the last go out at once.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from llava.serve.decoding.pool import start_in_thread
from llava.serve.job import Job
from llava.serve.protocol import MOST_ENTRIES, ErrorType, ServeError, encode_chunk, encode_error


@dataclass(frozen=True)
class Piece:
    """What an engine has added to an answer; the last piece has a `finish_reason` or an `error`."""

    text: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()
    """Per token: {"token", "logprob", "top": [{"token", "logprob"}]}, with "bytes" where they aren't the text's."""
    token_ids: tuple[int, ...] = ()
    """Where the engine knows them."""
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    """prompt_tokens, completion_tokens, cached_tokens."""
    error: ServeError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Backend(Protocol):
    """What a worker needs of whatever makes its answers."""

    def submit(self, job: Job, put: Callable[[Piece], None]) -> Callable[[], None]:
        """Begin to answer; `put` is called from any thread. Returns what cancels it. May block: not for the loop.

        Raises:
            ServeError: refused (queue full, context too long, bad image, ...).
        """

    def attention_map(self, job: Job, token_ids: list[int]) -> dict[str, Any]:
        """Where the model looked when it answered `job` with `token_ids`: the JSON of /worker_attention_map. May block.

        Raises:
            ServeError: the request isn't valid, or this backend can't tell.
        """

    def seen_images(self, job: Job) -> dict[str, Any]:
        """What the vision tower gets of the request's images: the JSON of /worker_seen_images. May block.

        Raises:
            ServeError: an image can't be read, or this backend can't tell.
        """

    def stats(self) -> dict[str, float]:
        """Gauges and counters: `queue_length` (waiting and running) at least."""

    def close(self) -> None: ...


@dataclass
class Mailbox:
    """Pieces from the engine's thread for a coroutine; notifies the loop once per reading, not once per piece."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    pieces: list[Piece] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, piece: Piece) -> None:
        with self.lock:
            self.pieces.append(piece)
            quiet = len(self.pieces) > 1 and not piece.is_last
        if not quiet:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody reads any more
                self.loop.call_soon_threadsafe(self._wake, piece.is_last)

    async def take(self, only_whole: bool) -> list[Piece]:
        """All that has come, once something has (or, with `only_whole`, once the last piece has)."""
        await (self.ended if only_whole else self.arrived).wait()
        with self.lock:
            taken, self.pieces = self.pieces, []
            self.arrived.clear()
        return taken

    async def pause(self, seconds: float) -> None:
        """Wait for more pieces, but not once the answer has ended."""
        # Not wait_for: on Python 3.11 it loses a cancel that comes as what it waits for is done.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ended.wait()

    def _wake(self, is_last: bool) -> None:
        self.arrived.set()
        if is_last:
            self.ended.set()


async def answer_chunks(
    backend: Backend, job: Job, request_id: str, interval: Callable[[], float], timeout: float
) -> AsyncGenerator[bytes, None]:
    """The stream of /worker_generate_stream. Leaving it early (a client that went away) cancels the request.

    Args:
        interval: gives the seconds until the next chunk.
        timeout: seconds for the whole answer.
    """
    mailbox = Mailbox()
    cancel = None
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        cancel = await _submit(backend, job, mailbox.put, timeout)
        text, last = job.prompt or "", None
        logprobs: list[dict[str, Any]] = []
        token_ids: list[int] = []
        while last is None:
            try:
                async with asyncio.timeout_at(deadline):
                    pieces = await mailbox.take(only_whole=not job.stream)
            except TimeoutError as error:
                raise ServeError(ErrorType.TIMEOUT, f"No whole answer within {timeout:g} seconds.") from error
            for piece in pieces:
                if piece.error is not None:
                    raise piece.error
                text += piece.text
                logprobs += piece.logprobs
                token_ids += piece.token_ids
                last = piece if piece.is_last else last
            more: dict[str, Any] = {}
            if job.sampling.logprobs is not None:
                while len(logprobs) > MOST_ENTRIES:
                    yield encode_chunk(text, logprobs=logprobs[:MOST_ENTRIES])
                    del logprobs[:MOST_ENTRIES]
                    await asyncio.sleep(0)
                more["logprobs"], logprobs = logprobs, []
            if job.token_ids:
                more["token_ids"], token_ids = token_ids, []
            if last is not None:
                cancel = None
                more |= {"finish_reason": last.finish_reason, "usage": last.usage, "request_id": request_id}
            yield encode_chunk(text, **more)
            if last is None:
                await mailbox.pause(interval())
    except ServeError as error:
        yield encode_error(error, request_id)
    finally:
        if cancel is not None:
            cancel()


async def _submit(backend: Backend, job: Job, put: Callable[[Piece], None], timeout: float) -> Callable[[], None]:
    """What cancels the request, once the engine has taken it and its images are open.

    Raises:
        ServeError: TIMEOUT; and what the backend raises.
    """
    has_schema = job.sampling.json_schema is not None
    work, waiting = start_in_thread(
        backend.submit, job, put, seconds=timeout, has_images=bool(job.images), has_schema=has_schema
    )
    try:
        async with asyncio.timeout(timeout):
            # Not shielded: a shield would leave the error of a request that was given up to the log.
            return await asyncio.wrap_future(work)
    except (TimeoutError, asyncio.CancelledError) as error:
        # Nobody waits any more: its images are given up, and what the engine takes yet is taken back.
        waiting.gone.set()
        if not work.cancel():
            work.add_done_callback(_cancel_late)
        if isinstance(error, TimeoutError):
            raise ServeError(ErrorType.TIMEOUT, f"No whole answer within {timeout:g} seconds.") from None
        raise


def _cancel_late(work: Future) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result()()
