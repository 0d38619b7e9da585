"""What workers answer, as pydantic models: a worker of another make, or a broken one, must not break its clients."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, model_validator

from llava.sampling_params import Fields, TokenId
from llava.serve.request_models import MOST_COUNTED, WorkerStatus

MOST_PENDING_BYTES = 64 << 20
"""Of a chunk that hasn't ended."""
Answered = TypeVar("Answered", bound=BaseModel)
Count = Annotated[int, Field(ge=0, le=MOST_COUNTED)]


class Usage(Fields):
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count = 0


class Alternative(Fields):
    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    """Where they aren't the text's: of a part of a character."""


class TokenLogprob(Alternative):
    top: list[Alternative]


class Chunk(Fields):
    """One chunk of an answer's stream; the last one has a reason and the usage, or an error's code."""

    text: str | None = None
    error_code: int = 0
    error_type: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    logprobs: list[TokenLogprob] | None = None
    token_ids: list[TokenId] | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> "Chunk":
        if self.text is None and not self.error_code:
            raise ValueError("a chunk has neither text nor an error's code")
        if self.finish_reason is not None and self.usage is None:
            raise ValueError("the last chunk has no usage")
        return self


class ReportedStatus(WorkerStatus):
    """A worker's status with its numbers, whose names become names of metrics."""

    stats: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")], float] = Field({}, max_length=64)


class AttentionMap(Fields):
    """What /worker_attention_map answers; each view's fields are the page's to read."""

    tokens: list[str]
    shares: list[float]
    views: list[dict[str, Any]]


class SeenImages(Fields):
    """What /worker_seen_images answers: PNGs as data: URLs, for tiles one each."""

    images: list[Annotated[str, Field(pattern=r"^data:image/png;base64,[A-Za-z0-9+/=]+$")]]
