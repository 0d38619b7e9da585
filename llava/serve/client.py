"""The way from a front (API, web UI, tools) to an answer: ask the controller where a model is, then that worker.

Needs no torch. A worker that can't be reached, or is lost before its first word, is replaced by another.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from llava.serve.protocol import ErrorType, ServeError, decode_error, split_chunks
from llava.serve.secret import headers

CONTROLLER_TIMEOUT = 10.0
CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 600.0  # the worker's own limit comes first
_TRY_ANOTHER = (ErrorType.NO_WORKER, ErrorType.QUEUE_FULL)  # a worker that is stopping, or has enough to do


class ServingClient:
    """Answers of the workers behind a controller. Close it with `await client.close()`."""

    def __init__(self, controller: str, secret: str | None):
        import httpx

        self.controller = controller.rstrip("/")
        self.http = httpx.AsyncClient(
            headers=headers(secret),
            timeout=httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    async def close(self) -> None:
        await self.http.aclose()

    async def models(self) -> list[str]:
        """Names of the models that are ready."""
        return (await self._ask_controller("/list_models"))["models"]

    async def refresh(self) -> list[str]:
        return (await self._ask_controller("/refresh_all_workers"))["models"]

    async def worker_stats(self) -> list[dict[str, Any]]:
        """Each worker's own status, with its address; who doesn't answer is left out."""
        import httpx

        found = []
        for worker in (await self._ask_controller("/list_workers"))["workers"]:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                reply = await self.http.post(f"{worker['address']}/worker_get_status", timeout=CONTROLLER_TIMEOUT)
                found.append({"address": worker["address"], **reply.raise_for_status().json()})
        return found

    async def address(self, model: str, exclude: set[str] | frozenset[str] = frozenset()) -> str | None:
        """Where the next request for `model` goes."""
        body = {"model": model, "exclude": sorted(exclude)}
        return (await self._ask_controller("/get_worker_address", body))["address"] or None

    async def generate(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
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
                return
            except _Unreachable as error:
                if begun:
                    raise ServeError(ErrorType.WORKER_LOST) from error
            except ServeError as error:
                if begun or error.error_type not in _TRY_ANOTHER:
                    raise
                refused = error
        if refused is not None:
            raise refused
        if tried:
            raise ServeError(ErrorType.WORKER_LOST)
        raise ServeError(ErrorType.NO_WORKER, f"No worker is ready for the model {body['model']!r}.")

    async def _stream(self, address: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        import httpx

        ended, rest = False, b""
        try:
            async with self.http.stream("POST", f"{address}/worker_generate_stream", json=body) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    raise _http_error(reply)
                async for data in reply.aiter_raw():
                    chunks, rest = split_chunks(rest + data)
                    for chunk in chunks:
                        if chunk.get("error_code"):
                            raise decode_error(chunk)
                        ended = ended or chunk.get("finish_reason") is not None
                        yield chunk
        except httpx.ReadTimeout as error:
            raise ServeError(ErrorType.TIMEOUT) from error
        except (httpx.TransportError, ValueError) as error:
            raise _Unreachable from error
        if not ended:
            raise _Unreachable

    async def _ask_controller(self, path: str, body: dict | None = None) -> dict[str, Any]:
        import httpx

        try:
            reply = await self.http.post(self.controller + path, json=body or {}, timeout=CONTROLLER_TIMEOUT)
            return reply.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            words = "The controller has another secret." if status == 401 else "The controller can't be reached."
            raise ServeError(ErrorType.NO_WORKER, words) from error


class WorkerClient(ServingClient):
    """Answers of one worker whose address is known, without a controller."""

    async def address(self, model: str, exclude: set[str] | frozenset[str] = frozenset()) -> str | None:
        return None if exclude else self.controller


class _Unreachable(Exception):
    """The worker is gone, or what it sends is no answer."""


def _http_error(reply) -> Exception:
    """A status other than 200: the worker's own words where it is one of ours."""
    try:
        error = reply.json()["error"]
        return ServeError(ErrorType(error["type"]), error["message"])
    except (ValueError, KeyError, TypeError):
        return _Unreachable(f"status {reply.status_code}")
