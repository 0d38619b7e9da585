"""The controller: knows the workers, tells clients where a model is, and passes requests on.

    python -m llava.serve.controller

It never loads a model and never calls an address that a client names: only addresses registered with the shared secret.
"""

import asyncio
import contextlib
import dataclasses
import logging
from typing import Any

from llava.commandline import ArgumentParser, run
from llava.errors import LlavaError
from llava.serve.protocol import TRY_ANOTHER, ErrorType, ServeError, check_address, encode_error, read_refusal
from llava.serve.registry import DISPATCH_METHODS, Registry, Worker, refreshed
from llava.serve.request_models import ForModel, Heartbeat, WorkerEntry, WorkerStatus, WorkerWanted
from llava.serve.secret import add_secret_flags, secret_from_args
from llava.serve.transport.background import repeating
from llava.serve.transport.bodies import JSON_HEADERS, parse_json, read_body, validated
from llava.serve.transport.hosts import Hosts, add_host_flags
from llava.serve.transport.middleware import MAX_BODY_BYTES, RequestMiddleware, answer_errors, secret_check
from llava.serve.transport.server import port_number, require_serving, run_server
from llava.serve.transport.session import READ_TIMEOUT, open_session, read_reply

logger = logging.getLogger(__name__)

STATUS_TIMEOUT = 5.0


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of this machine's")
    parser.add_argument("--port", type=port_number, default=21001, help="port to listen on")
    parser.add_argument(
        "--dispatch-method",
        choices=DISPATCH_METHODS,
        default="shortest_queue",
        help="which worker of a model gets a request",
    )
    parser.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES, help="largest request that is read")
    add_host_flags(parser)
    add_secret_flags(parser)
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    require_serving()
    secret = secret_from_args(args)
    if secret is None:
        logger.warning("running open: anybody who reaches port %d can register workers and ask", args.port)
    registry = Registry(args.dispatch_method, one_owner_per_model=secret is None)
    app = build_app(registry, secret, args.max_body_bytes, Hosts.from_args(args))
    run_server(app, args.host, args.port)


def build_app(
    registry: Registry, secret: str | None, max_body: int = MAX_BODY_BYTES, hosts: Hosts | None = None
) -> RequestMiddleware:
    """The ASGI application around a registry."""
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse

    session: Any = None  # belongs to the event loop, so it is made when that runs
    tasks: set[asyncio.Task] = set()  # the loop itself keeps no hold of its tasks

    def background(work) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def expire() -> None:
        for address in registry.expire():
            logger.warning("worker %s: no heartbeat, dropped", address)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        nonlocal session
        session = open_session(secret, READ_TIMEOUT)
        async with repeating(1.0, expire):
            logger.info("controller ready")
            yield
        await session.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    answer_errors(app)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.post("/register_worker")
    async def register_worker(request: Request) -> dict:
        body = await read_body(request, WorkerEntry)
        try:
            status = body.worker_status or await _ask_status(session, body.worker_name)
            worker = registry.register(body.worker_name, status, body.check_heart_beat)
        except LlavaError as error:
            raise ServeError(ErrorType.BAD_REQUEST, str(error)) from error
        logger.info("worker %s serves %s", worker.address, ", ".join(worker.model_names))
        return {"registered": worker.address}

    @app.post("/unregister_worker")
    async def unregister_worker(request: Request) -> dict:
        address = (await read_body(request, WorkerEntry)).worker_name
        registry.remove(address)
        logger.info("worker %r left", address)
        return {"unregistered": address}

    @app.post("/refresh_all_workers")
    async def refresh_all_workers() -> dict:
        await _refresh(registry, session)
        return {"models": registry.models()}

    @app.post("/list_models")
    async def list_models() -> dict:
        return {"models": registry.models(), "is_new": registry.is_new()}

    @app.post("/get_worker_address")
    async def get_worker_address(request: Request) -> dict:
        body = await read_body(request, WorkerWanted)
        # Addresses that the asker couldn't reach: passed over now, and dropped if we can't reach them either.
        failed = frozenset(body.exclude)
        for address in failed & registry.workers.keys():
            background(_drop_if_dead(registry, session, registry.workers[address]))
        return {"address": registry.choose(body.model, failed) or "", "is_new": registry.is_new()}

    @app.post("/list_workers")
    async def list_workers() -> dict:
        return {"workers": [dataclasses.asdict(worker) for worker in registry.workers.values()]}

    @app.post("/receive_heart_beat")
    async def receive_heart_beat(request: Request) -> dict:
        body = await read_body(request, Heartbeat)
        return {"exist": registry.heartbeat(body.worker_name, body.queue_length)}

    @app.post("/worker_get_status")
    async def worker_get_status() -> dict:
        return registry.status()

    @app.post("/worker_generate_stream")
    async def worker_generate_stream(request: Request):
        model = (await read_body(request, ForModel)).model
        chunks = _forward(registry, session, model, await request.body(), request.state.request_id)
        return StreamingResponse(chunks, media_type="application/octet-stream")

    return RequestMiddleware(app, secret_check(secret), max_body, hosts)


async def _forward(registry: Registry, session, model: str, body: bytes, request_id: str):
    """A worker's stream, from another worker if the first can't be reached or has enough to do; errors are the stream's
    last chunk."""
    import aiohttp

    tried: set[str] = set()
    refused: ServeError | None = None
    while address := registry.choose(model, frozenset(tried)):
        tried.add(address)
        begun = False
        try:
            url = f"{address}/worker_generate_stream"
            async with session.post(url, data=body, headers=JSON_HEADERS, allow_redirects=False) as reply:
                if reply.status != 200 and (refused := read_refusal(await read_reply(reply))) is not None:
                    if refused.error_type in TRY_ANOTHER:
                        continue
                    break
                _expect_ok(reply)
                async for chunk in reply.content.iter_any():
                    begun = True
                    yield chunk
            return
        except aiohttp.SocketTimeoutError:
            yield encode_error(ServeError(ErrorType.TIMEOUT), request_id)
            return
        except (aiohttp.ClientError, TimeoutError) as error:
            logger.warning("%s worker %s failed: %s", request_id, address, type(error).__name__)
            if not isinstance(error, aiohttp.ClientResponseError):
                registry.remove(address)
            if begun:
                yield encode_error(ServeError(ErrorType.WORKER_LOST), request_id)
                return
    if not tried:
        refused = ServeError(ErrorType.NO_WORKER, f"No worker is ready for the model {model!r}.")
    yield encode_error(refused or ServeError(ErrorType.WORKER_LOST), request_id)


async def _refresh(registry: Registry, session) -> None:
    """Ask every worker how it is, all at once; those that don't answer are dropped."""

    async def ask(worker: Worker) -> Worker | None:
        try:
            return refreshed(worker, await _ask_status(session, worker.address), registry.clock())
        except LlavaError as error:
            logger.warning("%s", error)
            return None

    before = list(registry.workers.values())
    for worker, answer in zip(before, await asyncio.gather(*map(ask, before)), strict=True):
        registry.replace(worker, answer)


async def _drop_if_dead(registry: Registry, session, worker: Worker) -> None:
    try:
        await _ask_status(session, worker.address)
    except LlavaError as error:
        logger.warning("%s, dropped", error)
        registry.replace(worker, None)


async def _ask_status(session, address: str) -> WorkerStatus:
    import aiohttp

    url = f"{check_address(address)}/worker_get_status"
    timeout = aiohttp.ClientTimeout(total=STATUS_TIMEOUT)
    try:
        async with session.post(url, timeout=timeout, allow_redirects=False) as reply:
            _expect_ok(reply)
            content = await read_reply(reply)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise LlavaError(f"worker {address} doesn't tell its status ({type(error).__name__})") from error
    try:
        return validated(parse_json(content), WorkerStatus)
    except ServeError as error:
        raise LlavaError(f"worker {address}: its status isn't one: {error}") from error


def _expect_ok(reply) -> None:
    """Any status but 200 is an error, a redirect too."""
    import aiohttp

    if reply.status != 200:
        raise aiohttp.ClientResponseError(reply.request_info, reply.history, status=reply.status)


if __name__ == "__main__":
    run(main)
