"""What stands before every server's routes: request ids, names, the secret or key, caps on size, errors in one form.

Plain ASGI, so that a body is counted while it arrives, before anything parses it.
"""

import asyncio
import contextlib
import json
import logging
import secrets
from collections import deque
from collections.abc import Callable, Mapping

from llava.serve.protocol import ERRORS, ErrorType, ServeError
from llava.serve.transport.hosts import Hosts

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
BODIES_AT_ONCE = 4
"""Of the largest size: a server's requests hold no more together. A byte of a body takes about three of memory."""
SMALL_BODY = 64 << 10
"""Bytes of each body that aren't counted, so that plain questions are answered beside any images."""
ONCE = (b"host", b"origin", b"authorization", b"x-llava-secret")  # the application might take another one
LIVENESS = "/health"  # the one path that needs no key
REQUEST_ID_HEADER = "x-request-id"


class Turns:
    """Lets those who wait go on one by one, each in a round of the event loop of its own.

    So a crowd that comes at once holds up nobody else, such as who asks for the server's health, for long.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return when it is the caller's turn."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_soon(self._next, loop)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        turn = self._waiting.popleft()
        if not turn.done():  # its request may have been given up
            turn.set_result(None)
        if self._waiting:
            loop.call_soon(self._next, loop)


class RequestMiddleware:
    """ASGI middleware.

    Args:
        app: the application that requests go on to.
        authorize: from the request's headers (lower-case names) to None, or a ServeError to answer with.
        max_body: bytes of a body; more is refused while it arrives. All bodies together, until their requests are
            answered, may have `BODIES_AT_ONCE` times as many.
        hosts: the names that the server answers to.
        headers: what every answer has beside its own.
    """

    def __init__(
        self,
        app,
        authorize: Callable[[dict[str, str]], ServeError | None],
        max_body: int = MAX_BODY_BYTES,
        hosts: Hosts | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        self.app = app
        self.authorize = authorize
        self.max_body = max_body
        self.held = 0
        """Bytes of the bodies of requests that aren't answered yet, beyond `SMALL_BODY` of each."""
        self.hosts = hosts or Hosts()
        self.headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.turns = Turns()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = "req-" + secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        scope["app"] = self.app  # a router alone answers in its own words where there is none
        started, refusal = False, None

        async def send_with_id(message):
            nonlocal started
            if refusal is not None and not started:
                raise refusal  # frameworks have words of their own for a body that breaks off
            if message["type"] == "http.response.start":
                started = True
                known = (REQUEST_ID_HEADER.encode(), request_id.encode())
                message["headers"] = [*message["headers"], known, *self.headers]
            await send(message)

        received, held, is_whole = 0, 0, False

        async def counted_receive():
            nonlocal received, held, is_whole, refusal
            message = await receive()
            if message["type"] == "http.disconnect" and not is_whole:
                refusal = ServeError(ErrorType.CANCELLED)  # left while it was sending: no fault of anyone here
            received += len(message.get("body", b""))
            scope["state"]["body_bytes"] = received
            self.held -= held
            held = max(0, received - SMALL_BODY)
            self.held += held
            is_whole = not message.get("more_body", False)
            if received > self.max_body:
                refusal = ServeError(ErrorType.TOO_LARGE, f"The request is larger than {self.max_body} bytes.")
            elif self._is_full():
                refusal = ServeError(ErrorType.FULL)
            if refusal is not None:
                raise refusal
            return message

        try:
            if scope["path"] != LIVENESS:
                await self.turns.wait()
            self._check(scope)
            await self.app(scope, counted_receive, send_with_id)
            return
        except ServeError as error:
            failure = error
        except Exception as error:
            failure = refusal or _routing_error(error) or ServeError(ErrorType.INTERNAL)
            if failure.error_type is ErrorType.INTERNAL:
                # The last place before the client: the log gets the details, the client a request id. A response that
                # has begun is left incomplete, which closes the connection.
                logger.exception("%s %s failed", request_id, scope["path"])
        finally:
            self.held -= held
        if not started:
            refusal = None
            await _send_error(send_with_id, failure, request_id)

    def _check(self, scope) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if len(headers) < len(scope["headers"]):
            names = [name.lower() for name, _ in scope["headers"]]
            if any(names.count(name) > 1 for name in ONCE):
                raise ServeError(ErrorType.BAD_REQUEST, "A header stands twice that may stand once.")
        if error := self.hosts.check(headers):
            raise error
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 20 or int(length) > self.max_body:
            raise ServeError(ErrorType.TOO_LARGE, f"The request is larger than {self.max_body} bytes.")
        if scope["path"] != LIVENESS:
            error = self.authorize(headers)
            if error is not None:
                raise error
        if self._is_full(int(length) - SMALL_BODY):
            raise ServeError(ErrorType.FULL)

    def _is_full(self, more: int = 0) -> bool:
        return self.held + max(0, more) > BODIES_AT_ONCE * self.max_body


def _routing_error(error: Exception) -> ServeError | None:
    """What a framework raises for a path or method that it has no route for."""
    status, headers = getattr(error, "status_code", None), getattr(error, "headers", None) or {}
    kinds = {404: ErrorType.NO_ROUTE, 405: ErrorType.WRONG_METHOD}
    return ServeError(kinds[status], allow=headers.get("Allow")) if status in kinds else None


async def unless_gone(receive, work):
    """The result of `work`, which is given up once the client has gone.

    Raises:
        ServeError: CANCELLED, the client has gone; and what `work` raises.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServeError(ErrorType.CANCELLED)
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ServeError):
            await task


async def _wait_until_gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def answer_errors(app) -> None:
    """Make a FastAPI application answer a ServeError (and a body that doesn't fit) in the one form of errors."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def on_serve_error(request, error: ServeError):
        return JSONResponse(error_body(error, request.state.request_id), error.status, error.headers)

    async def on_bad_body(request, error: RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return await on_serve_error(request, ServeError(ErrorType.BAD_REQUEST, f"{where}: {first['msg']}"))

    async def on_no_route(request, error: HTTPException):
        return await on_serve_error(request, _routing_error(error) or ServeError(ErrorType.INTERNAL))

    async def on_failure(request, _: Exception):
        # The framework raises it again once it is answered; then RequestMiddleware logs it.
        return await on_serve_error(request, ServeError(ErrorType.INTERNAL))

    app.add_exception_handler(Exception, on_failure)
    app.add_exception_handler(HTTPException, on_no_route)
    app.add_exception_handler(ServeError, on_serve_error)
    app.add_exception_handler(RequestValidationError, on_bad_body)


def secret_check(secret: str | None) -> Callable[[dict[str, str]], ServeError | None]:
    """`authorize` for controller and worker: the shared secret, compared in constant time."""
    from llava.serve.secret import HEADER

    def authorize(headers: dict[str, str]) -> ServeError | None:
        given = headers.get(HEADER, "")
        if secret is None or secrets.compare_digest(given.encode(), secret.encode()):
            return None
        return ServeError(ErrorType.UNAUTHORIZED, "The shared secret is missing or wrong.")

    return authorize


def error_body(error: ServeError, request_id: str) -> dict:
    """The JSON of an error, in the form that OpenAI's clients read."""
    kind = ERRORS[error.error_type]
    return {
        "error": {
            "message": str(error),
            "type": error.error_type.value,
            "param": None,
            "code": error.error_type.value,
            "error_code": kind.code,
            "request_id": request_id,
        }
    }


async def _send_error(send, error: ServeError, request_id: str) -> None:
    body = json.dumps(error_body(error, request_id), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
