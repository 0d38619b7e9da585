"""An OpenAI-compatible API in front of a controller's workers. Loads no model.

python -m llava.serve.openai_api_server [--controller http://localhost:21001] [--port 8000]
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError
from llava.serve.api.keys import VARIABLE, Keys, read_keys
from llava.serve.conversation_log import HEADER, add_log_flags, log_from_args, new_client
from llava.serve.daily_log import tidied
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.secret import add_secret_flags, secret_from_args
from llava.serve.transport.hosts import Hosts, add_host_flags
from llava.serve.transport.middleware import MAX_BODY_BYTES, RequestMiddleware, answer_errors, error_body, unless_gone
from llava.serve.transport.server import run_server

logger = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--controller-address", "--controller", default="http://localhost:21001")
    parser.add_argument(
        "--api-key-file", help=f"keys, one per line: name key [requests per minute] (default: ${VARIABLE})"
    )
    parser.add_argument("--requests-per-minute", type=float, help="of each key that has no limit of its own")
    parser.add_bool("--no-api-key", help="take requests without a key also from other machines")
    parser.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES)
    parser.add_bool("--openapi", help="print the API's description (OpenAPI) and end")
    add_log_flags(parser)
    add_host_flags(parser)
    add_secret_flags(parser)
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
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

    from llava.serve.api.metrics import Metrics
    from llava.serve.api.types import ChatRequest, model_entry
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
    async def openapi() -> dict:
        return document("api", kept_days)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model_entry(name) for name in await client.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        if name not in await client.models():
            raise ServeError(ErrorType.NO_WORKER, f"No worker is ready for the model {name!r}.")
        return model_entry(name)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        request_id = request.state.request_id
        body = await read_body(request, ChatRequest)
        answer = ChatAnswer(client, body, request_id, metrics)
        try:
            key = keys.admit({name.lower(): value for name, value in request.headers.items()})
            body.check()
            if not body.stream:
                reply = await unless_gone(request.receive, answer.whole())
                answer.count("ok")
                logger.info("%s key %s model %r: answered", request_id, key, body.model)
                return reply
            events = answer.events()
            # The first event decides the status: an error before it is no stream at all.
            first = await unless_gone(request.receive, anext(events))
        except ServeError as error:
            answer.count(error.error_type.value)
            logger.warning("%s model %r: %s", request_id, body.model, error.error_type.value)
            raise
        return StreamingResponse(_event_stream(first, events, answer), media_type="text/event-stream")

    headers = {} if kept_days is None else {HEADER: f"kept for {kept_days:g} days"}
    return RequestMiddleware(app, keys.authorize, max_body, hosts, headers)


class ChatAnswer:
    """One chat completion: `n` requests to workers and their replies in OpenAI's form."""

    def __init__(self, client, body, request_id: str, metrics):
        self.client, self.body, self.request_id, self.metrics = client, body, request_id, metrics
        self.began = time.monotonic()
        self.said_something = False

    async def whole(self) -> dict[str, Any]:
        from llava.serve.api.types import choice_logprobs, completion, sum_usage

        with self.metrics.in_flight.track_inprogress():
            tasks = [asyncio.create_task(self._collect(index)) for index in range(self.body.n)]
            try:
                answers = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text.lstrip(), "refusal": None},
                "finish_reason": last["finish_reason"],
                "logprobs": choice_logprobs(logprobs),
            }
            for index, (text, logprobs, last) in enumerate(answers)
        ]
        usage = sum_usage([last["usage"] for *_, last in answers])
        self.metrics.finished(usage, time.monotonic() - self.began)
        return completion(self.request_id, self.body.model, choices, usage)

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream, those of all choices as they come."""
        from llava.serve.api.types import completion_chunk, sum_usage

        queue: asyncio.Queue = asyncio.Queue()
        usages: list[dict[str, int]] = []
        with self.metrics.in_flight.track_inprogress():
            tasks = [asyncio.create_task(self._feed(index, queue)) for index in range(self.body.n)]
            for task in tasks:
                task.add_done_callback(lambda done: _pass_on(done, queue))
            try:
                while len(usages) < self.body.n:
                    item = await queue.get()
                    if isinstance(item, Exception):
                        raise item
                    choice, usage = item
                    if usage is not None:
                        usages.append(usage)
                    yield completion_chunk(self.request_id, self.body.model, [choice])
            finally:
                for task in tasks:
                    task.cancel()
        usage = sum_usage(usages)
        self.metrics.finished(usage, time.monotonic() - self.began)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield completion_chunk(self.request_id, self.body.model, [], usage)

    def count(self, status: str) -> None:
        self.metrics.requests.labels(self.body.model if status == "ok" else "", status).inc()
        if status != "ok":
            self.metrics.errors.labels(status).inc()

    async def _collect(self, index: int) -> tuple[str, list | None, dict]:
        logprobs: list | None = [] if self.body.logprobs else None
        text, last = "", {}
        async for chunk in self._chunks(index):
            text, last = chunk["text"], chunk
            if logprobs is not None:
                logprobs += chunk.get("logprobs") or []
        return text, logprobs, last

    async def _feed(self, index: int, queue: asyncio.Queue) -> None:
        """(choice, usage or None) for each chunk of one answer."""
        from llava.serve.api.types import choice_logprobs

        said, is_first = "", True
        async for chunk in self._chunks(index):
            # Templates leave a blank before the answer; whole answers come without it too.
            text = chunk["text"].lstrip()
            delta: dict[str, Any] = {"content": text[len(said) :]}
            if is_first:
                delta, is_first = {"role": "assistant"} | delta, False
            said = text
            reason = chunk.get("finish_reason")
            choice = {"index": index, "delta": delta, "finish_reason": reason}
            choice["logprobs"] = choice_logprobs(chunk.get("logprobs"))
            queue.put_nowait((choice, chunk["usage"] if reason else None))

    async def _chunks(self, index: int) -> AsyncIterator[dict[str, Any]]:
        body = self.body.worker_body(index, self.request_id)
        async with contextlib.aclosing(self.client.generate(body)) as chunks:
            async for chunk in chunks:
                if chunk["text"] and not self.said_something:
                    self.said_something = True
                    self.metrics.first_token.observe(time.monotonic() - self.began)
                yield chunk


def _pass_on(done: asyncio.Task, queue: asyncio.Queue) -> None:
    """Hand a failed task's exception to whoever reads the queue."""
    if not done.cancelled() and done.exception() is not None:
        queue.put_nowait(done.exception())


async def _event_stream(
    first: dict, events: AsyncGenerator[dict[str, Any], None], answer: ChatAnswer
) -> AsyncIterator[bytes]:
    status = ErrorType.CANCELLED.value  # until we know better: the client may leave
    try:
        async with contextlib.aclosing(events):
            yield _event(first)
            async for event in events:
                yield _event(event)
        status = "ok"
        yield b"data: [DONE]\n\n"
    except ServeError as error:
        status = error.error_type.value
        yield _event(error_body(error, answer.request_id))
    except Exception:
        status = ErrorType.INTERNAL.value
        logger.exception("%s failed", answer.request_id)
        yield _event(error_body(ServeError(ErrorType.INTERNAL), answer.request_id))
    finally:
        answer.count(status)
        logger.info("%s model %r: %s", answer.request_id, answer.body.model, status)


def _event(content: dict) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


if __name__ == "__main__":
    run(main)
