"""An OpenAI-compatible API in front of a controller's workers. Loads no model.

Chat completions with images, streamed or not; any client of that protocol can ask it.

python -m llava.serve.openai_api_server --controller http://localhost:21001 --port 8000
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError
from llava.serve.api.encoding import beside_loop, encoded, is_long
from llava.serve.api.keys import VARIABLE, Keys, read_keys
from llava.serve.conversation_log import HEADER, add_log_flags, log_from_args, new_client
from llava.serve.daily_log import tidied
from llava.serve.protocol import MOST_ENTRIES, ErrorType, ServeError
from llava.serve.secret import add_secret_flags, secret_from_args
from llava.serve.transport.hosts import LOOPBACK, Hosts, add_host_flags
from llava.serve.transport.middleware import MAX_BODY_BYTES, RequestMiddleware, answer_errors, error_body, unless_gone
from llava.serve.transport.server import port_number, require_serving, run_server

if TYPE_CHECKING:
    from llava.serve.api.fields import ApiRequest
    from llava.serve.api.metrics import Metrics

logger = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of this machine's")
    parser.add_argument("--port", type=port_number, default=8000, help="port to listen on")
    parser.add_argument(
        "--controller-address", "--controller", default="http://localhost:21001", help="who knows the models"
    )
    parser.add_argument(
        "--api-key-file", help=f"keys, one per line: name key [requests per minute] (default: ${VARIABLE})"
    )
    parser.add_argument("--requests-per-minute", type=float, help="of each key that has no limit of its own")
    parser.add_bool("--no-api-key", help="take requests without a key also from other machines")
    parser.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES, help="largest request that is read")
    parser.add_bool("--openapi", help="print the API's description (OpenAPI) and end")
    add_log_flags(parser)
    add_host_flags(parser)
    add_secret_flags(parser)
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    require_serving()
    if args.openapi:
        from llava.serve.description import document

        kept_days = args.conversation_log_days if args.conversation_log else None
        return write_line(json.dumps(document("api", kept_days), indent=1))
    keys = read_keys(args.api_key_file, args.requests_per_minute)
    if not keys.required and args.host not in LOOPBACK and not args.no_api_key:
        raise LlavaError(
            f"--host {args.host} lets other machines ask; give --api-key-file or ${VARIABLE}, or --no-api-key"
        )
    client = new_client(args.controller_address, secret_from_args(args), log_from_args(args))
    app = build_app(client, keys, args.max_body_bytes, Hosts.from_args(args))
    run_server(app, args.host, args.port)


def build_app(client, keys: Keys, max_body: int = MAX_BODY_BYTES, hosts: Hosts | None = None) -> RequestMiddleware:
    """The ASGI application over a `ServingClient`."""
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import StreamingResponse

    from llava.serve.api.chat import ChatRequest
    from llava.serve.api.choices import Choices
    from llava.serve.api.completions import CompletionRequest
    from llava.serve.api.metrics import Metrics
    from llava.serve.api.models import find_model, model_entry, unknown_model
    from llava.serve.api.responses import ResponsesRequest
    from llava.serve.description import document
    from llava.serve.transport.bodies import read_body

    metrics = Metrics()
    kept_days = client.log.keep_days if client.log else None

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with tidied(client.log):
            yield
        await client.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    answer_errors(app)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict:
        models = await client.models()
        if not models:
            raise ServeError(ErrorType.NO_WORKER, "No worker is ready yet.")
        return {"status": "ready", "models": models}

    @app.get("/metrics")
    async def read_metrics() -> Response:
        try:
            workers = await client.worker_stats()
        except ServeError:
            workers = []
        return Response(metrics.text(workers), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(encoded(document("api", kept_days)), media_type="application/json")

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model_entry(name) for name in await client.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        return model_entry(await find_model(client, name))

    async def answer(request: Request, kind: "type[ApiRequest]", end: bytes = b""):
        """The reply to a request of that kind, or its stream of events, which `end` closes."""
        request_id = request.state.request_id
        body = await read_body(request, kind)
        account = Account(metrics, request_id, body.model)
        try:
            account.key = keys.admit({name.lower(): value for name, value in request.headers.items()})
            body.check()
            form = body.form(request_id)
            choices = Choices(client, body.worker_bodies(request_id), metrics, request.state.body_bytes)
            if not body.stream:
                whole = await unless_gone(request.receive, choices.whole())
                is_much = any(len(choice.logprobs) > MOST_ENTRIES for choice in whole)
                content = await beside_loop(is_much, lambda: encoded(form.whole(whole)))
                account.close("ok")
                # Not left to the framework, which takes a dictionary apart value by value before it is written.
                return Response(content, media_type="application/json")
            events = form.events(choices.steps())
            # The first event decides the status: an error before it is no stream at all.
            first = await unless_gone(request.receive, anext(events))
        except ServeError as error:
            error = await unknown_model(client, body.model, error)
            account.close(error.error_type.value)
            raise error from None
        return StreamingResponse(_event_stream(first, events, account, end), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await answer(request, ChatRequest, DONE)

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await answer(request, CompletionRequest, DONE)

    @app.post("/v1/responses")
    async def responses(request: Request):
        return await answer(request, ResponsesRequest)

    headers = {} if kept_days is None else {HEADER: f"kept for {kept_days:g} days"}
    return RequestMiddleware(app, keys.authorize, max_body, hosts, headers)


class Account:
    """Counts and logs how one request ended."""

    def __init__(self, metrics: "Metrics", request_id: str, model: str):
        self.metrics, self.request_id, self.model = metrics, request_id, model
        self.key = ""

    def close(self, status: str) -> None:
        self.metrics.requests.labels(self.model if status == "ok" else "", status).inc()
        if status == "ok":
            logger.info("%s key %s model %r: answered", self.request_id, self.key, self.model)
        else:
            self.metrics.errors.labels(status).inc()
            logger.warning("%s model %r: %s", self.request_id, self.model, status)


async def _event_stream(
    first: dict[str, Any], events: AsyncGenerator[dict[str, Any], None], account: Account, end: bytes
) -> AsyncIterator[bytes]:
    status = ErrorType.CANCELLED.value  # until we know better: the client may leave
    try:
        async with contextlib.aclosing(events):
            yield _event(first)
            async for event in events:
                yield await beside_loop(is_long(event), _event, event)
                await asyncio.sleep(0)  # events that are ready hold up nobody else
        status = "ok"
        yield end
    except ServeError as error:
        status = error.error_type.value
        yield _event(error_body(error, account.request_id))
    except Exception:
        status = ErrorType.INTERNAL.value
        logger.exception("%s failed", account.request_id)
        yield _event(error_body(ServeError(ErrorType.INTERNAL), account.request_id))
    finally:
        account.close(status)


def _event(content: dict[str, Any]) -> bytes:
    """A server-sent event; those that have a type of their own are named by it."""
    name = f"event: {content['type']}\n".encode() if "type" in content else b""
    return name + b"data: " + encoded(content) + b"\n\n"


if __name__ == "__main__":
    run(main)
