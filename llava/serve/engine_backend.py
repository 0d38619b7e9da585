"""The engine behind a worker: requests as jobs in, pieces of text out, exceptions as typed errors."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.errors import LlavaError
from llava.generation import Engine, Request, SamplingParams
from llava.images import open_uploaded_image
from llava.serve.answering import Piece
from llava.serve.job import Job, to_conversation
from llava.serve.protocol import ErrorType, ServeError

logger = logging.getLogger(__name__)


class EngineBackend:
    """A thread that owns the model; see `llava.serve.answering.Backend`."""

    def __init__(self, engine: Engine, max_queue: int = 256):
        self.engine = engine
        self.waiting: queue.Queue = queue.Queue(max_queue)
        self.running = 0
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, job: Job, put: Callable[[Piece], None]) -> Callable[[], None]:
        request = to_request(job, self.engine.model.config.conversation_template)
        stopped = threading.Event()
        try:
            self.waiting.put_nowait((request, put, stopped))
        except queue.Full:
            raise ServeError(ErrorType.QUEUE_FULL, retry_after=1.0) from None
        return stopped.set

    def stats(self) -> dict[str, float]:
        return {"queue_length": self.waiting.qsize() + self.running, "running": self.running}

    def close(self) -> None:
        self.waiting.put(None)

    def _run(self) -> None:
        while (entry := self.waiting.get()) is not None:
            request, put, stopped = entry
            self.running = 1
            try:
                count = 0
                for piece in self.engine.stream(request):
                    count += 1
                    if stopped.is_set():
                        break
                    put(Piece(piece))
                usage = {"prompt_tokens": 0, "completion_tokens": count, "cached_tokens": 0}
                put(Piece(finish_reason="stop", usage=usage))
            except Exception as error:
                put(Piece(error=to_serve_error(error)))
            finally:
                self.running = 0


def to_request(job: Job, template_name: str) -> Request:
    """The engine's request; pictures are opened here.

    Raises:
        ServeError: BAD_PICTURE.
    """
    template = get_template(template_name)
    conversation = to_conversation(job.messages, template) if job.messages else ready_prompt(job.prompt, template)
    sampling = SamplingParams(job.temperature, job.top_p, job.max_new_tokens, job.stop, job.seed)
    return Request(conversation, [_open(picture) for picture in job.pictures], sampling)


def ready_prompt(prompt: str, template: Conversation) -> Conversation:
    """A text that the client has put into the template's words itself: a conversation that renders as just that."""
    return replace(template, system=prompt, messages=[], offset=0, sep_style=SeparatorStyle.MPT, sep="", sep2=None)


def to_serve_error(error: Exception) -> ServeError:
    """A typed error for the client; what isn't known is logged here and told to nobody."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return ServeError(ErrorType.OUT_OF_MEMORY)
    if isinstance(error, LlavaError):
        return ServeError(ErrorType.BAD_REQUEST, str(error))
    logger.error("the engine failed", exc_info=error)
    return ServeError(ErrorType.INTERNAL)


def _open(picture: str):
    try:
        return open_uploaded_image(picture)
    except LlavaError as error:
        raise ServeError(ErrorType.BAD_PICTURE, str(error)) from error
