"""The way from a front (API, web UI, tools) to an answer: ask the controller where a model is, then that worker.

Needs no torch. A worker that can't be reached, or is lost before its first word, is replaced by another.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

from pydantic_core import from_json

from llava.serve.daily_log import DailyLog
from llava.serve.protocol import (
    END_OF_CHUNK,
    TRY_ANOTHER,
    ErrorType,
    ServeError,
    decode_error,
    read_refusal,
    split_chunks,
)
from llava.serve.request_models import ModelCard
from llava.serve.transport.bodies import JSON_HEADERS, written
from llava.serve.transport.session import READ_TIMEOUT, open_session, read_reply
from llava.serve.worker_answers import MOST_PENDING_BYTES, Answered, AttentionMap, Chunk, ReportedStatus, SeenImages

logger = logging.getLogger(__name__)

SHORT_TIMEOUT = 10.0
REMEMBERED_SECONDS = 60.0


class ServingClient:
    """Answers of a controller's workers. Close it with `await client.close()`."""

    log: DailyLog | None = None
    """Where what is asked and answered is kept (llava.serve.conversation_log)."""

    def __init__(self, controller: str, secret: str | None):
        self.controller = controller.rstrip("/")
        self.secret = secret
        self._session: Any = None
        self._models = _Memory()
        self._addresses: defaultdict[str, _Memory] = defaultdict(_Memory)  # by models that workers have

    @property
    def session(self):
        """Made at the first request: a session belongs to the event loop it is made in."""
        if self._session is None:
            self._session = open_session(self.secret, READ_TIMEOUT)
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def models(self) -> list[str]:
        """Names of the models that are ready."""
        try:
            reply = await self._ask_controller("/list_models")
        except ServeError:
            if remembered := self._models.recent():
                return sorted(remembered)
            raise
        self._models.note(*reply["models"])
        remembered = self._models.recent() if reply.get("is_new") else []
        return sorted({*reply["models"], *remembered})

    async def worker_stats(self) -> list[dict[str, Any]]:
        """Each worker's own status, with its address; workers that don't answer are left out, and hold up no other."""
        import aiohttp

        async def ask(address: str) -> list[dict[str, Any]]:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                status = await self._post(f"{address}/worker_get_status", {})
                return [{"address": address, **ReportedStatus.model_validate(status).model_dump()}]
            return []

        workers = (await self._ask_controller("/list_workers"))["workers"]
        answers = await asyncio.gather(*(ask(worker["address"]) for worker in workers))
        return [status for answer in answers for status in answer]

    async def cards(self) -> dict[str, ModelCard | None]:
        """What is known of each model; of several workers' the first one's words count."""
        found: dict[str, ModelCard | None] = {}
        for worker in (await self._ask_controller("/list_workers"))["workers"]:
            card = ModelCard.model_validate(worker["card"]) if worker.get("card") else None
            for name in worker["model_names"]:
                found[name] = found.get(name) or card
        return found

    async def address(self, model: str, exclude: set[str] | frozenset[str] = frozenset()) -> str | None:
        """Where the next request for `model` goes."""
        try:
            reply = await self._ask_controller("/get_worker_address", {"model": model, "exclude": sorted(exclude)})
        except ServeError:
            if remembered := self._remembered(model, exclude):
                return remembered
            raise
        if reply["address"]:
            self._addresses[model].note(reply["address"])
            return reply["address"]
        return self._remembered(model, exclude) if reply.get("is_new") else None

    def _remembered(self, model: str, exclude: set[str] | frozenset[str]) -> str | None:
        known = self._addresses[model].recent() if model in self._addresses else []
        able = [address for address in known if address not in exclude]
        return random.choice(able) if able else None

    async def generate(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of an answer (llava.serve.job's request).

        Raises:
            ServeError: no worker, the worker lost in the middle, or what the worker itself answered.
        """
        tried: set[str] = set()
        refused: ServeError | None = None
        while address := await self.address(body["model"], tried):
            tried.add(address)
            begun = False
            try:
                async with contextlib.aclosing(self._stream(address, body)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                self._addresses[body["model"]].note(address)
                return
            except _Unreachable as error:
                if begun:
                    raise ServeError(ErrorType.WORKER_LOST) from error
            except ServeError as error:
                if begun or error.error_type not in TRY_ANOTHER:
                    raise
                refused = error
        if refused is not None:
            raise refused
        if tried:
            raise ServeError(ErrorType.WORKER_LOST)
        raise ServeError(ErrorType.NO_WORKER, await self._no_worker(body["model"]))

    async def _no_worker(self, model: str) -> str:
        words = f"No worker is ready for the model {model!r}."
        try:
            ready = await self.models()
        except ServeError:
            ready = []
        return f"{words} Ready: {', '.join(ready)}." if ready else f"{words} No model is ready."

    async def attention_map(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a worker's /worker_attention_map answers.

        Raises:
            ServeError: no worker, or what the worker itself answered.
        """
        return (await self._ask_worker("/worker_attention_map", body, AttentionMap)).model_dump()

    async def seen_images(self, body: dict[str, Any]) -> list[str]:
        """What the model's tower gets of the images of a request, as data: URLs (a worker's /worker_seen_images).

        Raises:
            ServeError: no worker, or what the worker itself answered.
        """
        return (await self._ask_worker("/worker_seen_images", body, SeenImages)).images

    async def _ask_worker(self, path: str, body: dict[str, Any], model: type[Answered]) -> Answered:
        import aiohttp

        address = await self.address(body["model"])
        if address is None:
            raise ServeError(ErrorType.NO_WORKER, await self._no_worker(body["model"]))
        try:
            async with self._send(address + path, body) as reply:
                content = await read_reply(reply, MOST_PENDING_BYTES)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServeError(ErrorType.WORKER_LOST) from error
        if reply.status != 200:
            refused = _http_error(reply.status, content)
            raise refused if isinstance(refused, ServeError) else ServeError(ErrorType.INTERNAL)
        try:
            return model.model_validate_json(content)
        except ValueError as error:
            raise ServeError(ErrorType.WORKER_LOST) from error

    async def _stream(self, address: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        import aiohttp

        ended, rest = False, bytearray()
        try:
            url = f"{address}/worker_generate_stream"
            async with self._send(url, body) as reply:
                if reply.status != 200:
                    raise _http_error(reply.status, await read_reply(reply))
                async for data in reply.content.iter_any():
                    rest += data
                    chunks: list[dict[str, Any]] = []
                    if END_OF_CHUNK in data:  # else a long chunk would be searched anew with each piece of it
                        chunks, left = split_chunks(bytes(rest))
                        rest = bytearray(left)
                    if len(rest) > MOST_PENDING_BYTES:
                        raise _Unreachable("a chunk without an end")
                    for chunk in chunks:
                        Chunk.model_validate(chunk)
                        if chunk.get("error_code"):
                            raise decode_error(chunk)
                        ended = ended or chunk.get("finish_reason") is not None
                        yield chunk
        except aiohttp.SocketTimeoutError as error:
            raise ServeError(ErrorType.TIMEOUT) from error
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as error:
            raise _Unreachable from error
        if not ended:
            raise _Unreachable

    def _send(self, url: str, body: dict[str, Any]) -> Any:
        """A request with images in it; what aiohttp's `post` gives."""
        return self.session.post(url, data=written(body), headers=JSON_HEADERS, allow_redirects=False)

    async def _ask_controller(self, path: str, body: dict | None = None) -> dict[str, Any]:
        import aiohttp

        try:
            return await self._post(self.controller + path, body or {})
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            is_refused = isinstance(error, aiohttp.ClientResponseError) and error.status == 401
            why = "has another secret" if is_refused else "can't be reached"
            logger.warning("the controller at %s %s", self.controller, why)  # clients learn no address
            raise ServeError(ErrorType.NO_WORKER, f"The controller {why}.") from error

    async def _post(self, url: str, body: dict[str, Any]) -> Any:
        """The JSON of a short answer."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=SHORT_TIMEOUT)
        async with self.session.post(
            url, json=body, timeout=timeout, raise_for_status=True, allow_redirects=False
        ) as reply:
            return from_json(await read_reply(reply))


class _Memory:
    """What a controller has said of late, for the time in which it is started anew: it can't be asked, and then it
    doesn't know all its workers yet."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def note(self, *names: str) -> None:
        for name in names:
            self._seen[name] = time.monotonic()

    def recent(self) -> list[str]:
        """What was noted within the last `REMEMBERED_SECONDS`."""
        oldest = time.monotonic() - REMEMBERED_SECONDS
        self._seen = {name: when for name, when in self._seen.items() if when >= oldest}
        return list(self._seen)


class WorkerClient(ServingClient):
    """Answers of one worker whose address is known, without a controller."""

    async def address(self, model: str, exclude: set[str] | frozenset[str] = frozenset()) -> str | None:
        return None if exclude else self.controller


class _Unreachable(Exception):
    """The worker is gone, or what it sends is no answer."""


def answer_text(text: str, body: dict[str, Any]) -> str:
    """What a chunk's text says in answer to a request: without its ready prompt, or the blanks in front of an answer
    that doesn't go on with one."""
    return text.removeprefix(body["prompt"]) if body.get("prompt") else text.lstrip()


def _http_error(status: int, content: bytes) -> Exception:
    """A status other than 200: the worker's own words where it is one of ours."""
    return read_refusal(content) or _Unreachable(f"status {status}")
