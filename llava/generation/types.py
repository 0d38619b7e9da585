"""What goes into the engine and what comes out: `Request`, `SamplingParams`, `Answer`, and pieces of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.conversation import Conversation
from llava.errors import LlavaError


class EngineBusy(LlavaError):
    """The queue is full; the request was not taken and may be sent again later."""


class ContextTooLong(LlavaError):
    """The prompt leaves no room for an answer."""


class OutOfMemory(LlavaError):
    """The device's memory doesn't suffice for this request."""


@dataclass(frozen=True)
class SamplingParams:
    """How to decode.

    `temperature` 0 is greedy. `top_p` and `top_k` (0: all) cut the distribution that is sampled from. The same
    `seed` gives the same answer whatever else is answered at the same time. `stop` strings end an answer and
    aren't part of it. `logprobs` asks for each token's log-probability and that many alternatives.
    `num_beams` above 1 is beam search, one request at a time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    num_beams: int = 1
    ignore_eos: bool = False
    """Go on to `max_new_tokens` whatever the model says; for measurements."""

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        checks = {
            "temperature must be 0 or more": 0 <= self.temperature < float("inf"),
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "top_k must be 0 (all) or more": self.top_k >= 0,
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "logprobs must be from 0 to 20": self.logprobs is None or 0 <= self.logprobs <= 20,
            "num_beams must be at least 1": self.num_beams >= 1,
            "stop strings must not be empty": all(isinstance(text, str) and text for text in stop),
            "beam search doesn't sample; set temperature to 0": self.num_beams == 1 or self.temperature == 0,
            "beam search gives no logprobs": self.num_beams == 1 or self.logprobs is None,
        }
        for message, is_fine in checks.items():
            if not is_fine:
                raise LlavaError(message)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True)
class Request:
    """One thing to answer.

    `conversation` is one whose last turn is the question; or a prompt as text, with an `<image>` for each
    image; or its ids, with an IMAGE_TOKEN_INDEX for each. `images` are, in reading order, whatever
    `llava.images.open_image` takes.
    """

    conversation: Conversation | str | Sequence[int]
    images: Sequence[Any] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: Any = None


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
    """`text` is without outer blanks and without what ended it.

    `finish_reason` is "stop" (end mark or stop string), "length" (max_new_tokens, or the context is full),
    "cancelled" or "error". `token_ids` are all that were generated but for the end mark.
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
