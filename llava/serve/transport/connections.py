"""One connection of a server, with limits on what comes before and around a request's body.

uvicorn's protocol takes headers of any length, for any time, and parses them before an application sees anything.
Here bytes and seconds are counted as they arrive; what goes beyond a limit gets a typed error and the connection ends.
"""

import asyncio
import gc
import json
import logging
import os
import secrets
import socket
from dataclasses import dataclass
from functools import partial

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from llava.serve.protocol import ErrorType, ServeError
from llava.serve.transport.background import repeating
from llava.serve.transport.memory import RETURN_SECONDS, return_free_memory
from llava.serve.transport.middleware import REQUEST_ID_HEADER, error_body

ACCEPTED_AT_ONCE = 2
"""Connections in one round of the event loop."""
logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
"""How often a connection looks at the clock, so its times are exact to a second."""
LINGER_SECONDS = 2.0
"""How long a refused connection still reads: closed at once, the system would throw the answer away."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection may do. Page, API, controller and workers all keep the same ones."""

    head_bytes: int = 32 << 10
    """Request line and headers; also the lines between chunks and after them, beyond the length of the body itself."""
    headers: int = 100
    head_seconds: float = 10.0
    """From the first byte of a request (or from connecting) to the end of its headers."""
    body_rate: int = 4 << 10
    """Bytes per second of a body, at least, over `body_seconds`; only while the server is willing to read."""
    body_seconds: float = 10.0
    read_seconds: float = 60.0
    """How long a client may leave an answer unread."""
    pipelined: int = 100
    """Requests that wait for the answer to an earlier one of their connection; those after them aren't read."""
    connections: int = 2000
    """Of one server; `llava.serve.transport.server` keeps it below the number of files a process may open."""


class FairServer(uvicorn.Server):
    """Takes new connections a few at a time, so that a crowd keeps it from the ones it has only for a moment.

    The others wait with the system, whose queue is as long as ever. What was loaded before it started stays: Python's
    collector need not look through all of that again, which takes a tenth of a second each time.
    """

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with repeating(RETURN_SECONDS, return_free_memory):
            await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        queue, self.config.backlog = self.config.backlog, ACCEPTED_AT_ONCE
        await super().startup(sockets)
        for listening in (listening for server in self.servers for listening in server.sockets):
            with socket.socket(fileno=os.dup(listening.fileno())) as same:
                same.listen(queue)
            logger.info("Uvicorn running on http://%s:%d (Press CTRL+C to quit)", *listening.getsockname()[:2])
        gc.collect()
        gc.freeze()


def limited(limits: ConnectionLimits):
    """What uvicorn takes as `http`."""
    return partial(LimitedProtocol, limits)


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits. A request is either in its head (also before its first byte) or in its body."""

    def __init__(self, limits: ConnectionLimits, **more):
        super().__init__(**more)
        self.limits = limits
        self.in_head = True
        self.head_bytes = 0
        self.body_bytes = 0
        self.around_body = 0  # chunk sizes, their extensions, trailers
        self.left_over: int | None = None  # bytes of a body that came after its answer
        self.messages = 0
        self.window_bytes = 0  # came in the present stretch of `body_seconds`
        self.was_paused = False  # by us, in that stretch
        self.has_ended = False  # what still comes is not looked at
        self.deadline: float | None = None  # of the head, or of the present stretch of a body
        self.unread_since: float | None = None
        self.closing_since: float | None = None
        self.tick_handle: asyncio.TimerHandle | None = None

    # asyncio's side

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.deadline = self.loop.time() + self.limits.head_seconds
        self.tick_handle = self.loop.call_later(TICK_SECONDS, self._tick)
        if len(self.connections) > self.limits.connections and not self._close_an_idle_one():
            self._refuse(ServeError(ErrorType.BUSY))

    def connection_lost(self, exc) -> None:
        self.has_ended = True
        if self.tick_handle is not None:
            self.tick_handle.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.in_head and self.deadline is None:
            self.deadline = self.loop.time() + self.limits.head_seconds
        while data and not self.has_ended:
            # No more of a head is given to the parser than it may be long.
            piece = data[: self.limits.head_bytes - self.head_bytes + 1] if self.in_head else data
            data = data[len(piece) :]
            self._feed(piece)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.unread_since = None

    def _feed(self, piece: bytes) -> None:
        was_in_head, before, message = self.in_head, self.body_bytes, self.messages
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is served here: it is answered as a plain request
        except httptools.HttpParserError:
            return self._refuse(ServeError(ErrorType.BAD_REQUEST, "This is not HTTP."))
        self.window_bytes += len(piece)
        if self.messages != message:
            self.head_bytes = 0
        elif self.in_head:
            self.head_bytes += len(piece)
            if self.head_bytes > self.limits.head_bytes:
                self._refuse(ServeError(ErrorType.HEADERS_TOO_LARGE))
        elif not was_in_head:
            self.around_body += len(piece) - (self.body_bytes - before)
            if self.around_body > self.limits.head_bytes + self.body_bytes:
                self._refuse(ServeError(ErrorType.HEADERS_TOO_LARGE))

    # The parser's side; after a refusal it goes on to the end of what it was given

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:  # a trailer would be added to headers that were checked before
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.headers) > self.limits.headers:
            self._refuse(ServeError(ErrorType.HEADERS_TOO_LARGE))
        if not self.has_ended and len(self.pipeline) >= self.limits.pipelined:
            self.has_ended = True
            self.cycle.keep_alive = False  # the connection ends with the last answer
        if self.has_ended:
            return
        self.in_head = False
        self.body_bytes = self.around_body = 0
        self._begin_window()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.has_ended:
            return
        self.body_bytes += len(body)
        if self.left_over is not None:
            self.left_over += len(body)
            if self.left_over > self.limits.head_bytes:
                self._end()
                return
        super().on_body(body)
        self.was_paused = self.was_paused or self.flow.read_paused

    def on_message_complete(self) -> None:
        if self.has_ended:
            return
        self.in_head = True
        self.messages += 1
        self.deadline = None
        super().on_message_complete()
        if self.left_over is not None:
            self.left_over = None
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.in_head:
            # Answered before the body had come: a short rest is read and forgotten, so that the client may ask again.
            self.left_over = 0

    # Limits

    def _begin_window(self) -> None:
        self.deadline = self.loop.time() + self.limits.body_seconds
        self.window_bytes, self.was_paused = 0, self.flow.read_paused

    def _tick(self) -> None:
        self.tick_handle = self.loop.call_later(TICK_SECONDS, self._tick)
        now = self.loop.time()
        if self.transport.is_closing() and self.closing_since is None:
            self.closing_since = now
        unread = min(since for since in (self.unread_since, self.closing_since, now) if since is not None)
        if now > unread + self.limits.read_seconds:
            self.transport.abort()
        elif self.deadline is not None and now >= self.deadline and not self.has_ended:
            self._on_deadline(now)

    def _on_deadline(self, now: float) -> None:
        if not self.in_head:
            if self.was_paused or self.window_bytes >= self.limits.body_rate * self.limits.body_seconds:
                self._begin_window()
            else:
                self._refuse(ServeError(ErrorType.SLOW))
        elif self._is_answering():
            self.deadline = now + self.limits.head_seconds  # it sends the next request before the answer's end
        elif self.head_bytes:
            self._refuse(ServeError(ErrorType.SLOW))
        else:
            self._end()  # a browser's spare connection

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _is_idle(self) -> bool:
        """Between two requests: such a connection may be closed at any time."""
        return self.in_head and self.cycle is not None and not self._is_answering() and self.deadline is None

    def _close_an_idle_one(self) -> bool:
        for other in self.connections:
            if isinstance(other, LimitedProtocol) and other is not self and other._is_idle():
                other.transport.close()
                return True
        return False

    def send_400_response(self, msg: str) -> None:
        self._refuse(ServeError(ErrorType.BAD_REQUEST, msg))

    def _refuse(self, error: ServeError) -> None:
        """Answer, where the client waits for an answer to what it is sending, and end the connection."""
        if self.has_ended:
            return
        if self._is_answering():
            # Unless it is this request's turn and nothing was said, the words would stand inside another answer.
            may_speak = not self.in_head and not self.pipeline and not self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        else:
            may_speak = True
        if may_speak and not self.transport.is_closing():
            self.transport.write(_answer(error))
        self._end()

    def _end(self) -> None:
        """Read and drop what still comes, for a moment; then close."""
        if not self.has_ended:
            self.has_ended = True
            self.flow.resume_reading()
            if self.transport.can_write_eof() and not self.transport.is_closing():
                self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _answer(error: ServeError) -> bytes:
    request_id = "req-" + secrets.token_hex(8)
    body = json.dumps(error_body(error, request_id)).encode()
    headers = {
        REQUEST_ID_HEADER: request_id,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    headers |= error.headers
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    return STATUS_LINE[error.status] + "".join(lines).encode() + b"\r\n" + body
