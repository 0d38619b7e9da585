"""A worker's model on an OpenAI-compatible server: vLLM, SGLang or `transformers serve` makes the answers.

The checkpoint goes there in transformers' layout (`python -m llava.model.export_hf`). What such a server brings, such
as tensor parallelism over GPUs and machines, then serves this project's controller, API and page. Needs no torch.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, MOST_OF_TOKEN
from llava.errors import LlavaError, require
from llava.images import open_uploaded_image, png_data_url
from llava.openai_client.transport import http_client, token_count
from llava.serve.decoding.pool import DecodingPool
from llava.serve.job import Job, Message, SentImage
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.worker.answering import Piece

logger = logging.getLogger(__name__)

MOST_SENT, MOST_HELD = 64 << 20, 256 << 20
"""Characters of a request's images as PNG, which may have twenty times as many as came; of all requests'."""
_CLOSING_SECONDS = 10
"""For the last pieces of what is cancelled."""


class UpstreamBackend:
    """Requests go on to `api_base`, a limited number at a time; see `llava.serve.worker.answering.Backend`.

    Args:
        api_base: the server's address with its `/v1`.
        model: the name that the server knows the model by.
        api_key: sent as a bearer token, never logged.
        concurrency: requests at the server at the same time; `max_waiting` more wait here.
        timeout: seconds between two signs of life of the server.
    """

    def __init__(
        self,
        api_base: str,
        model: str,
        api_key: str | None = None,
        concurrency: int = 32,
        max_waiting: int = 256,
        timeout: float = 300.0,
    ):
        self.openai = require("openai", "openai")
        self.client = self.openai.AsyncOpenAI(
            base_url=api_base,
            api_key=api_key or "none",
            timeout=timeout,
            max_retries=0,
            http_client=http_client(timeout),
        )
        self.model = model
        self.pool = DecodingPool()
        self.limit = concurrency + max_waiting
        self.held = 0
        self.counts = {"running": 0, "waiting": 0, "finished": 0, "failed": 0}
        self.lock = threading.Lock()
        self.is_closed = False
        self.slots = asyncio.Semaphore(concurrency)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="upstream", daemon=True)
        self.thread.start()

    def submit(self, job: Job, put: Callable[[Piece], None]) -> Callable[[], None]:
        if job.messages is None:
            raise ServeError(
                ErrorType.BAD_REQUEST,
                "this model is served through an OpenAI-compatible server: send messages, not a ready prompt",
            )
        request, size = to_request(job, self.model, self.pool.open)
        with self.lock:
            if self.is_closed:
                raise ServeError(ErrorType.WORKER_LOST)
            if self.counts["running"] + self.counts["waiting"] >= self.limit or self.held + size > MOST_HELD:
                raise ServeError(ErrorType.QUEUE_FULL, retry_after=1.0)
            self.counts["waiting"] += 1
            self.held += size
            task = asyncio.run_coroutine_threadsafe(self._answer(request, size, put), self.loop)

        # A turn of the loop later: a task that is cancelled before its first step would never say that it has ended.
        def cancel() -> None:
            self.loop.call_soon_threadsafe(self.loop.call_soon, task.cancel)

        return cancel

    def attention_map(self, job: Job, token_ids: list[int]) -> dict[str, Any]:
        raise ServeError(ErrorType.BAD_REQUEST, "The server that runs this model doesn't tell where the model looked.")

    def seen_images(self, job: Job) -> dict[str, Any]:
        raise ServeError(ErrorType.BAD_REQUEST, "The server that runs this model doesn't tell what the model sees.")

    def stats(self) -> dict[str, float]:
        with self.lock:
            return {"queue_length": self.counts["running"] + self.counts["waiting"], **self.counts}

    def close(self) -> None:
        """Cancel what is under way, each to its last piece; nothing is taken in from now on."""
        with self.lock:
            if self.is_closed:
                return
            self.is_closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        self.thread.join(_CLOSING_SECONDS)
        self.pool.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.loop.stop()

    async def _answer(self, request: dict[str, Any], size: int, put: Callable[[Piece], None]) -> None:
        """One request, to its last piece; cancelling it closes the connection, so that the server stops too."""
        state = "waiting"
        last = Piece(error=ServeError(ErrorType.CANCELLED))  # unless it ends otherwise
        try:
            async with self.slots:
                self._count(waiting=-1, running=1)
                state = "running"
                last = await self._forward(request, put)
        except Exception as error:  # noqa: BLE001 - the package doesn't check what a server sends: anything may come of it
            last = Piece(error=to_serve_error(error))
        finally:
            self._count(**{state: -1, "finished" if last.error is None else "failed": 1})
            with self.lock:
                self.held -= size
            put(last)

    async def _forward(self, request: dict[str, Any], put: Callable[[Piece], None]) -> Piece:
        """Pass on what comes, no more of it than was asked for; the piece that ends it."""
        reason = usage = None
        top, tokens = request.get("top_logprobs", 0), request["max_tokens"]
        characters = tokens * MOST_OF_TOKEN
        async with await self.client.chat.completions.create(**request) as stream:
            async for chunk in stream:
                if chunk.usage is not None:
                    usage = chunk.usage
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    content = choice.delta.content or ""
                    entries = (choice.logprobs and choice.logprobs.content) or () if "logprobs" in request else ()
                    tokens, characters = tokens - len(entries), characters - len(content)
                    if min(tokens, characters) < 0:
                        logger.error("the server that runs the model doesn't keep to max_tokens: its answer is cut off")
                        return Piece(finish_reason="length", usage=_usage(usage))
                    if content or entries:
                        put(Piece(content, tuple(_logprob(entry, top) for entry in entries)))
        if reason is None:
            return Piece(error=ServeError(ErrorType.WORKER_LOST))
        return Piece(finish_reason="length" if reason == "length" else "stop", usage=_usage(usage))

    def _count(self, **changes: int) -> None:
        with self.lock:
            for name, change in changes.items():
                self.counts[name] += change


def to_request(job: Job, model: str, open_upload: Callable = open_uploaded_image) -> tuple[dict[str, Any], int]:
    """The keywords of the openai package's `chat.completions.create`, and how many characters its images have;
    `open_upload` opens them.

    Raises:
        ServeError: BAD_IMAGE; TOO_LARGE, the images together have more than `MOST_SENT` characters.
    """
    size = 0

    def png_url(image: SentImage) -> str:
        nonlocal size
        url = _png_url(image, open_upload)
        size += len(url)
        if size > MOST_SENT:
            words = f"The images have more than {MOST_SENT >> 20} MiB as PNG, as they are sent on; send smaller ones."
            raise ServeError(ErrorType.TOO_LARGE, words)
        return url

    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": message.role, "content": _content(message, png_url)} for message in job.messages or ()],
        "temperature": job.sampling.temperature,
        "top_p": job.sampling.top_p,
        "max_tokens": job.sampling.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if job.sampling.logprobs is not None:
        request |= {"logprobs": True, "top_logprobs": job.sampling.logprobs}
    # In addition to the package's own arguments, so that fields that OpenAI hasn't (vLLM's top_k) go through too.
    request["extra_body"] = job.sampling.openai_fields()
    return request, size


def to_serve_error(error: Exception) -> ServeError:
    """What the server's refusal means for our client; its words go on only where they are about the request."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return ServeError(ErrorType.TIMEOUT)
    if isinstance(error, openai.APIConnectionError):
        logger.error("the server that runs the model can't be reached: %s", error)
        return ServeError(ErrorType.WORKER_LOST)
    if isinstance(error, openai.RateLimitError):
        return ServeError(ErrorType.QUEUE_FULL, retry_after=1.0)
    if isinstance(error, openai.BadRequestError):
        words = (error.body or {}).get("message", "") if isinstance(error.body, dict) else ""
        kind = ErrorType.CONTEXT_TOO_LONG if "context" in words.lower() else ErrorType.BAD_REQUEST
        return ServeError(kind, words)
    logger.error("the server that runs the model failed", exc_info=error)
    return ServeError(ErrorType.INTERNAL)


def _content(message: Message, png_url: Callable[[SentImage], str]) -> str | list[dict[str, Any]]:
    """Text, or parts with each image in its place, as PNG: so such a server shows what it has no reader for."""
    if not message.images:
        return message.text
    pieces = message.text.split(DEFAULT_IMAGE_TOKEN)
    parts: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        if place:
            parts.append({"type": "image_url", "image_url": {"url": png_url(message.images[place - 1])}})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _png_url(image: SentImage, open_upload: Callable) -> str:
    try:
        return png_data_url(open_upload(image))
    except LlavaError as error:
        raise ServeError(ErrorType.BAD_IMAGE, str(error)) from error


def _usage(usage: Any) -> dict[str, int]:
    """What a server tells of its tokens, which may be nothing (None)."""
    details = getattr(usage, "prompt_tokens_details", None)
    return {
        "prompt_tokens": token_count(getattr(usage, "prompt_tokens", None)),
        "completion_tokens": token_count(getattr(usage, "completion_tokens", None)),
        "cached_tokens": token_count(getattr(details, "cached_tokens", None)),
    }


def _logprob(entry: Any, top: int) -> dict[str, Any]:
    return _token(entry) | {"top": [_token(other) for other in (entry.top_logprobs or ())[:top]]}


def _token(entry: Any) -> dict[str, Any]:
    """With the bytes that the server tells of a part of a character."""
    told = {"token": entry.token, "logprob": entry.logprob}
    written = getattr(entry, "bytes", None)
    if isinstance(written, list) and len(written) <= MOST_OF_TOKEN:
        is_sound = all(isinstance(byte, int) and 0 <= byte < 256 for byte in written)
        if is_sound and bytes(written) != entry.token.encode():
            told["bytes"] = written
    return told
