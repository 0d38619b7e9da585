"""What goes into the engine and what comes out: `Request`, `Answer`, and pieces of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.conversation import Conversation
from llava.errors import LlavaError
from llava.sampling_params import SamplingParams as SamplingParams


class EngineBusy(LlavaError):
    """The queue is full; the request was not taken and may be sent again later."""


class EngineStopped(LlavaError):
    """The engine was stopped: the request was not taken in, or is given up."""


class ContextTooLong(LlavaError):
    """The prompt leaves no room for an answer."""


class OutOfMemory(LlavaError):
    """The device's memory doesn't suffice for this request."""


@dataclass(frozen=True)
class Request:
    """One conversation to be answered.

    `conversation` is one whose last turn is the question; or a prompt as text, with an `<image>` for each
    image; or its ids, with an IMAGE_TOKEN_INDEX for each. `images` are, in reading order, whatever
    `llava.images.open_image` takes.
    """

    conversation: Conversation | str | Sequence[int]
    images: Sequence[Any] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: Any = None
    is_continued: bool = False
    """Whether the answer goes on with a text: its outer blanks stay."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural, of the model's own distribution) of a token and of the likeliest ones there."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """(token id, text, log-probability), likeliest first."""


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by: text that will not change any more, and the tokens made since the last piece."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None


@dataclass
class Answer:
    """`text` is without what ended it and, unless it goes on with a text, without outer blanks.

    `finish_reason` is "stop" (end mark or stop string), "length" (max_new_tokens, or the context or the engine's memory
    is full), "cancelled" or "error". `token_ids` are all that were generated but for the end mark.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    id: Any = None
    prompt_tokens: int = 0
    """Positions of the prompt, those of images included."""
    cached_tokens: int = 0
    """How many of them were taken from earlier work."""
    logprobs: list[TokenLogprob] | None = None
    error: LlavaError | None = None


@dataclass
class Counts:
    """What the engine has done since it was made."""

    steps: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preempted: int = 0


def for_user(error: Exception) -> LlavaError:
    """What ended a request, as whoever asked reads it."""
    if isinstance(error, LlavaError):
        return error
    return OutOfMemory("the device ran out of memory for this request; send a shorter one or fewer images")


def name_request(error: LlavaError, id: Any) -> None:
    """Have the words of an error begin with which of several requests it is of, where that has an id."""
    if id is not None:
        error.args = (f"request {id!r}: {error}",)
