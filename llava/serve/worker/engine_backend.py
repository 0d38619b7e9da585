"""The engine in a worker: requests as jobs in, pieces of text out, exceptions as typed errors."""

import base64
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llava.conversation import get_template
from llava.errors import ImageError, LlavaError
from llava.generation import (
    Answer,
    ContextTooLong,
    Engine,
    EngineBusy,
    EngineStopped,
    OutOfMemory,
    Request,
    TokenLogprob,
)
from llava.generation import Piece as EnginePiece
from llava.image_options import with_options_of
from llava.images import png_data_url
from llava.record_content import image_file
from llava.serve.decoding.pool import DecodingPool
from llava.serve.decoding.schemas import SchemaPool
from llava.serve.job import Job, SentImage, to_conversation
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.worker.answering import Piece

logger = logging.getLogger(__name__)


class EngineBackend:
    """The engine in a thread of its own; see `llava.serve.worker.answering.Backend`.

    Images and schemas are untrusted: those that the engine doesn't know yet are opened in processes of their own.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.template = get_template(engine.model.config.conversation_template)
        self.pool = DecodingPool()
        engine.encoder.opener = self.pool.open
        self.schemas = SchemaPool()
        engine.prompts.constraints.check = self.schemas.check
        engine.start()

    def submit(self, job: Job, put: Callable[[Piece], None]) -> Callable[[], None]:
        try:
            listener = self._listener(put, job.stream)
            return self.engine.submit(self._request(job), listener, pieces=job.stream).cancel
        except (LlavaError, torch.OutOfMemoryError) as error:
            raise to_serve_error(error) from error

    def attention_map(self, job: Job, token_ids: list[int]) -> dict[str, Any]:
        try:
            # The answer is there; nothing has to be allowed any more.
            unbound = replace(job, sampling=job.sampling.model_copy(update={"json_schema": None}))
            found = self.engine.attention_map(self._request(unbound), token_ids)
        except (LlavaError, torch.OutOfMemoryError) as error:
            raise to_serve_error(error) from error
        views = [
            {
                "number": view.number,
                "image": png_data_url(view.image),
                "side": view.weights.shape[1],
                "weights": base64.b64encode(view.weights.astype("<f2").tobytes()).decode(),
            }
            for view in found.views
        ]
        return {"tokens": found.tokens, "shares": [round(float(share), 4) for share in found.shares], "views": views}

    def seen_images(self, job: Job) -> dict[str, Any]:
        encoder = self.engine.encoder
        try:
            sources = [encoder.identify(_as_content(image)) for image in job.images]
            return {"images": [png_data_url(tile) for source in sources for tile in encoder.seen(source)]}
        except LlavaError as error:
            raise to_serve_error(error) from error

    def stats(self) -> dict[str, float]:
        statistics = self.engine.statistics()
        return {"queue_length": statistics["running"] + statistics["waiting"], **statistics}

    def close(self) -> None:
        self.engine.stop(drain=False)
        self.pool.close()
        self.schemas.close()

    def _request(self, job: Job) -> Request:
        conversation = to_conversation(job.messages, self.template) if job.messages else job.prompt or ""
        images = [_as_content(image) for image in job.images]
        return Request(conversation, images, job.sampling, is_continued=job.messages is None)

    def _listener(self, put: Callable[[Piece], None], is_streamed: bool) -> Callable[[EnginePiece | Answer], None]:
        """The engine's news as this worker's pieces; the text of an answer that isn't streamed comes with the last."""
        count = 0

        def listen(news: EnginePiece | Answer) -> None:
            nonlocal count
            if isinstance(news, EnginePiece):
                count += len(news.token_ids)
                logprobs = tuple(self._logprob(entry) for entry in news.logprobs or ())
                put(Piece(news.text, logprobs, tuple(news.token_ids)))
            elif news.error is not None:
                put(Piece(error=to_serve_error(news.error)))
            elif news.finish_reason == "cancelled":
                put(Piece(error=ServeError(ErrorType.CANCELLED)))
            else:
                usage = {
                    "prompt_tokens": news.prompt_tokens,
                    "completion_tokens": len(news.token_ids),
                    "cached_tokens": news.cached_tokens,
                }
                late = tuple(self._logprob(entry) for entry in (news.logprobs or [])[count:])
                text = "" if is_streamed else news.text
                put(Piece(text, late, tuple(news.token_ids[count:]), news.finish_reason, usage))

        return listen

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token_id, text, logprob) for token_id, text, logprob in entry.top]
        return self._token(entry.token_id, entry.text, entry.logprob) | {"top": top}

    def _token(self, token_id: int, text: str, logprob: float) -> dict[str, Any]:
        """With its bytes where they aren't the text's: in a part of a character."""
        written = self.engine.scheduler.detokenizer.token_bytes(token_id)
        part = {} if written == text.encode("utf-8", "replace") else {"bytes": list(written)}
        return {"token": text, "logprob": logprob, **part}


def to_serve_error(error: Exception) -> ServeError:
    """A typed error for the client; what isn't known is logged here and told to nobody."""
    if isinstance(error, EngineBusy):
        return ServeError(ErrorType.QUEUE_FULL, retry_after=1.0)
    if isinstance(error, EngineStopped):
        return ServeError(ErrorType.WORKER_LOST)
    if isinstance(error, ContextTooLong):
        return ServeError(ErrorType.CONTEXT_TOO_LONG, str(error))
    if isinstance(error, (OutOfMemory, torch.OutOfMemoryError, MemoryError)):
        return ServeError(ErrorType.OUT_OF_MEMORY)
    if isinstance(error, ImageError):
        return ServeError(ErrorType.BAD_IMAGE, str(error))
    if isinstance(error, LlavaError):
        return ServeError(ErrorType.BAD_REQUEST, str(error))
    logger.error("the engine failed", exc_info=error)
    return ServeError(ErrorType.INTERNAL)


def _as_content(image: SentImage) -> SentImage:
    """Base64 or a data: URL in one form, so that the engine knows it again however it was sent; never a path."""
    file: str = image_file(image)
    content = file.partition(",")[2] if file[:5].lower() == "data:" else file
    return with_options_of(image, f"data:application/octet-stream;base64,{content}")
