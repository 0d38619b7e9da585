"""The controller: knows the workers, tells clients where a model is, and passes requests on.

    python -m llava.serve.controller --host 0.0.0.0 --port 10000

It never loads a model and never calls an address that a client names: only addresses registered with the shared secret.
"""

import asyncio
import contextlib
import dataclasses
import logging

from llava.commandline import ArgumentParser, run
from llava.errors import LlavaError
from llava.serve.hosts import Hosts, add_host_flags
from llava.serve.http_server import run_server
from llava.serve.middleware import MAX_BODY_BYTES, RequestMiddleware, answer_errors, secret_check
from llava.serve.protocol import ErrorType, ServeError, check_address, encode_error
from llava.serve.registry import DISPATCH_METHODS, Registry, Worker, refreshed
from llava.serve.secret import add_secret_flags, headers, secret_from_args

logger = logging.getLogger(__name__)

STATUS_TIMEOUT = 5.0
CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 120.0  # between two pieces of an answer


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=21001)
    parser.add_argument("--dispatch-method", choices=DISPATCH_METHODS, default="shortest_queue")
    parser.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES)
    add_host_flags(parser)
    add_secret_flags(parser)
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
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
    import httpx
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse

    client = httpx.AsyncClient(
        headers=headers(secret),
        timeout=httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        follow_redirects=False,
        trust_env=False,
    )

    tasks: set[asyncio.Task] = set()  # the loop itself keeps no hold of its tasks

    def background(work) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        expiring = asyncio.create_task(_expire_for_ever(registry))
        logger.info("controller ready")
        yield
        expiring.cancel()
        await client.aclose()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    answer_errors(app)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.post("/register_worker")
    async def register_worker(request: Request) -> dict:
        body = await _json(request)
        address, status = body.get("worker_name"), body.get("worker_status")
        try:
            if status is None:
                status = await _ask_status(client, str(address))
            worker = registry.register(str(address), status, bool(body.get("check_heart_beat", True)))
        except LlavaError as error:
            raise ServeError(ErrorType.BAD_REQUEST, str(error)) from error
        logger.info("worker %s serves %s", worker.address, ", ".join(worker.model_names))
        return {"registered": worker.address}

    @app.post("/unregister_worker")
    async def unregister_worker(request: Request) -> dict:
        address = str((await _json(request)).get("worker_name"))
        registry.remove(address)
        logger.info("worker %s left", address)
        return {"unregistered": address}

    @app.post("/refresh_all_workers")
    async def refresh_all_workers() -> dict:
        await _refresh(registry, client)
        return {"models": registry.models()}

    @app.post("/list_models")
    async def list_models() -> dict:
        return {"models": registry.models()}

    @app.post("/get_worker_address")
    async def get_worker_address(request: Request) -> dict:
        body = await _json(request)
        # Addresses that the asker couldn't reach: passed over now, and dropped if we can't reach them either.
        failed = frozenset(str(address) for address in body.get("exclude") or ())
        for address in failed & registry.workers.keys():
            background(_drop_if_dead(registry, client, address))
        return {"address": registry.choose(str(body.get("model")), failed) or ""}

    @app.post("/list_workers")
    async def list_workers() -> dict:
        return {"workers": [dataclasses.asdict(worker) for worker in registry.workers.values()]}

    @app.post("/receive_heart_beat")
    async def receive_heart_beat(request: Request) -> dict:
        body = await _json(request)
        return {"exist": registry.heartbeat(str(body.get("worker_name")), int(body.get("queue_length") or 0))}

    @app.post("/worker_get_status")
    async def worker_get_status() -> dict:
        return registry.status()

    @app.post("/worker_generate_stream")
    async def worker_generate_stream(request: Request):
        body = await _json(request)
        chunks = _forward(registry, client, str(body.get("model")), await request.body(), request.state.request_id)
        return StreamingResponse(chunks, media_type="application/octet-stream")

    return RequestMiddleware(app, secret_check(secret), max_body, hosts)


async def _forward(registry: Registry, client, model: str, body: bytes, request_id: str):
    """A worker's stream, from another worker if the first can't be reached; errors are the stream's last chunk."""
    import httpx

    tried: set[str] = set()
    while address := registry.choose(model, frozenset(tried)):
        tried.add(address)
        begun = False
        try:
            async with client.stream("POST", f"{address}/worker_generate_stream", content=body) as reply:
                reply.raise_for_status()
                async for chunk in reply.aiter_raw():
                    begun = True
                    yield chunk
            return
        except httpx.ReadTimeout:
            yield encode_error(ServeError(ErrorType.TIMEOUT), request_id)
            return
        except httpx.HTTPError as error:
            logger.warning("%s worker %s failed: %s", request_id, address, type(error).__name__)
            if isinstance(error, httpx.TransportError):
                registry.remove(address)
            if begun:
                yield encode_error(ServeError(ErrorType.WORKER_LOST), request_id)
                return
    lost = ErrorType.WORKER_LOST if tried else ErrorType.NO_WORKER
    words = None if tried else f"No worker is ready for the model {model!r}."
    yield encode_error(ServeError(lost, words), request_id)


async def _refresh(registry: Registry, client) -> None:
    """Ask every worker how it is, all at once, and swap the table; who doesn't answer is dropped."""

    async def ask(worker: Worker) -> Worker | None:
        try:
            return refreshed(worker, await _ask_status(client, worker.address), registry.clock())
        except LlavaError as error:
            logger.warning("%s", error)
            return None

    before = dict(registry.workers)
    answers = await asyncio.gather(*(ask(worker) for worker in before.values()))
    joined_meanwhile = [worker for address, worker in registry.workers.items() if address not in before]
    registry.replace_all([worker for worker in answers if worker is not None] + joined_meanwhile)


async def _drop_if_dead(registry: Registry, client, address: str) -> None:
    try:
        await _ask_status(client, address)
    except LlavaError as error:
        logger.warning("%s, dropped", error)
        registry.remove(address)


async def _ask_status(client, address: str) -> dict:
    import httpx

    try:
        reply = await client.post(f"{check_address(address)}/worker_get_status", timeout=STATUS_TIMEOUT)
        reply.raise_for_status()
        return reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise LlavaError(f"worker {address} doesn't tell its status ({type(error).__name__})") from error


async def _expire_for_ever(registry: Registry) -> None:
    while True:
        await asyncio.sleep(1.0)
        for address in registry.expire():
            logger.warning("worker %s: no heartbeat, dropped", address)


async def _json(request) -> dict:
    try:
        body = await request.json()
    except ValueError as error:
        raise ServeError(ErrorType.BAD_REQUEST, "The body is not JSON.") from error
    if not isinstance(body, dict):
        raise ServeError(ErrorType.BAD_REQUEST, "The body is not a JSON object.")
    return body


if __name__ == "__main__":
    run(main)
