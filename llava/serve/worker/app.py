"""A worker's HTTP side, around anything that answers: text, attention maps, images as the model sees them, status."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Coroutine
from typing import Any

from llava.serve.decoding.pool import in_thread
from llava.serve.job import Job, read_attention_map_request, read_job
from llava.serve.protocol import ErrorType, ServeError, encode_error
from llava.serve.request_models import ModelCard
from llava.serve.transport.bodies import read_json
from llava.serve.transport.hosts import Hosts
from llava.serve.transport.middleware import MAX_BODY_BYTES, RequestMiddleware, secret_check, unless_gone
from llava.serve.transport.server import server_settings
from llava.serve.worker.answering import Backend, answer_chunks
from llava.serve.worker.heartbeat import Membership

logger = logging.getLogger(__name__)


USUAL_STREAMS = 32
"""Every chunk costs this server and the one in front of it: more streams share what so many take, so that other
requests don't wait."""
SWITCH_SECONDS = 0.0005
"""A backend's thread gives the interpreter away only when told to; each request changes threads several times."""


class WorkerApp:
    """The ASGI application `asgi` and its state: names served, whether it is draining.

    Args:
        interval: seconds between two chunks of a stream; with more than `USUAL_STREAMS` of them, more.
        timeout: seconds for a whole answer.
        card: what is told of the model.
    """

    def __init__(
        self,
        backend: Backend,
        model_names: list[str],
        secret: str | None,
        *,
        speed: float = 1.0,
        interval: float = 0.04,
        timeout: float = 300.0,
        max_body: int = MAX_BODY_BYTES,
        hosts: Hosts | None = None,
        card: ModelCard | None = None,
    ):
        self.backend, self.model_names, self.speed, self.card = backend, model_names, speed, card
        self.interval, self.timeout = interval, timeout
        self.draining = False
        self._streams = 0
        self.asgi = RequestMiddleware(self._routes(), secret_check(secret), max_body, hosts)

    def status(self) -> dict:
        stats = self.backend.stats()
        queue_length = int(stats["queue_length"])
        return {
            "model_names": self.model_names,
            "speed": self.speed,
            "queue_length": queue_length,
            "card": None if self.card is None else self.card.model_dump(),
            "draining": self.draining,
            "stats": stats,
        }

    def _routes(self):
        from starlette.responses import JSONResponse
        from starlette.routing import Route, Router

        @contextlib.asynccontextmanager
        async def lifespan(_):
            yield
            self.backend.close()

        async def health(_):
            return JSONResponse({"status": "ok"})

        async def worker_get_status(_):
            return JSONResponse(self.status())

        async def worker_attention_map(request):
            job, token_ids = read_attention_map_request(await read_json(request))
            self._check(job)
            found = in_thread(self.backend.attention_map, job, token_ids, seconds=self.timeout)
            return JSONResponse(await unless_gone(request.receive, found))

        async def worker_seen_images(request):
            job = read_job(await read_json(request))
            self._check(job)
            found = in_thread(self.backend.seen_images, job, seconds=self.timeout)
            return JSONResponse(await unless_gone(request.receive, found))

        routes = [
            Route("/health", health),
            Route("/worker_get_status", worker_get_status, methods=["POST"]),
            Route("/worker_generate_stream", _Stream(self), methods=["POST"]),
            Route("/worker_attention_map", worker_attention_map, methods=["POST"]),
            Route("/worker_seen_images", worker_seen_images, methods=["POST"]),
        ]
        # No more of a framework than this: what it does for a request would cost as much as the model's answer.
        return Router(routes, lifespan=lifespan)

    def _check(self, job: Job) -> None:
        if self.draining:
            raise ServeError(ErrorType.NO_WORKER, "This worker is stopping and takes nothing new.")
        if job.model and job.model not in self.model_names:
            words = f"This worker serves {', '.join(self.model_names)}, not {job.model!r}."
            raise ServeError(ErrorType.NO_WORKER, words)

    async def chunks(self, body, request_id: str):
        """The answer to `body`; every error is the stream's last chunk, as clients of the old protocol expect."""
        try:
            job = read_job(body)
            request_id = job.request_id or request_id
            self._check(job)
        except ServeError as error:
            yield encode_error(error, request_id)
            return
        answer = answer_chunks(self.backend, job, request_id, self._interval, self.timeout)
        self._streams += job.stream
        try:
            async with contextlib.aclosing(answer):
                async for chunk in answer:
                    yield chunk
        except Exception:
            # The last place before the client: the log gets the details, the client a request id.
            logger.exception("%s failed", request_id)
            yield encode_error(ServeError(ErrorType.INTERNAL), request_id)
        finally:
            self._streams -= job.stream

    def _interval(self) -> float:
        return self.interval * max(1.0, self._streams / USUAL_STREAMS)


class _Stream:
    """/worker_generate_stream as plain ASGI."""

    def __init__(self, worker: WorkerApp):
        self.worker = worker

    async def __call__(self, scope, receive, send) -> None:
        from starlette.requests import Request

        body = await read_json(Request(scope, receive))
        headers = [(b"content-type", b"application/octet-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(ServeError):
            await unless_gone(receive, self._send(self.worker.chunks(body, scope["state"]["request_id"]), send))

    async def _send(self, chunks, send) -> None:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def serve(worker: WorkerApp, host: str, port: int, membership: Membership | None, drain_seconds: int) -> None:
    """Run until SIGTERM or SIGINT; then leave the controller, let running answers finish, and end."""
    import uvicorn

    from llava.serve.transport.connections import FairServer

    class Server(FairServer):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            if membership is not None and not self.should_exit:
                membership.start()

        async def shutdown(self, sockets=None):
            worker.draining = True
            if membership is not None:
                await membership.leave()
                await membership.close()
            await super().shutdown(sockets)

    settings = server_settings(host, port, timeout_graceful_shutdown=drain_seconds)
    await Server(uvicorn.Config(worker.asgi, **settings)).serve()


def run_serving(serving: Coroutine[Any, Any, None]) -> None:
    """Run what ends with `serve`, as a whole process: its loop has to get its turn beside the backend's threads."""
    import uvicorn

    sys.setswitchinterval(SWITCH_SECONDS)
    # uvloop where it is installed, as uvicorn.run would take it.
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
        runner.run(serving)
