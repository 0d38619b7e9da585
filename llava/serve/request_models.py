"""What clients send, as pydantic models: OpenAI's messages, a worker's request, what the controller is told.

Shapes, ranges and lengths are checked here, before anything is joined or tokenised; what several fields have to do
with each other is checked in `llava.serve.job` and `llava.serve.api`.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llava.errors import LlavaError
from llava.image_options import ImageOptions
from llava.sampling_params import MOST_LOGPROBS, Fields, SamplingFields, SamplingParams, TokenId, Whole

MAX_IMAGES = 32
MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_TEXT = 4 << 20
"""Characters of all texts together: more than a context of a million tokens holds."""
MAX_ANSWER_IDS = 65_536
MOST_COUNTED = 1 << 31
"""Of requests or tokens, as a worker counts them: more would break what is reckoned with them."""
MOST_SPEED = 1e6
DEFAULT_NEW_TOKENS = 256
_REQUEST_ID = re.compile(r"req-[0-9a-f]{16}")

ModelName = Annotated[str, Field(max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""One line: it goes into logs."""


def at_most(most: int) -> BeforeValidator:
    """For lists: `max_length` alone looks at every item first, and says so afterwards."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > most:
            words = "List should have at most {most} items, not {length}"
            raise PydanticCustomError("too_long", words, {"most": most, "length": len(value)})
        return value

    return BeforeValidator(check)


class ImageUrl(Fields):
    url: str


def _image_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def _image_options(value: Any) -> Any:
    try:
        return ImageOptions.parse(value).as_dict()
    except LlavaError as error:
        raise PydanticCustomError("image_options", "{words}", {"words": str(error)}) from error


ImageOptionsField = Annotated[
    dict[str, Any] | None, BeforeValidator(_image_options, json_schema_input_type=ImageOptions | None)
]
"""How a DICOM or NIfTI image is shown (`llava.image_options`): this project's own addition to OpenAI's forms."""


class Part(Fields):
    """A piece of a message. `image` takes the next of the request's own `images`."""

    type: Literal["text", "image_url", "image"]
    text: str | None = Field(None, max_length=MAX_TEXT)
    image_url: Annotated[ImageUrl | None, BeforeValidator(_image_url, json_schema_input_type=str | ImageUrl | None)] = (
        None
    )
    image_options: ImageOptionsField = None


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(Fields):
    """One of OpenAI's messages; content that is one text is one part.

    The call of a function is read as the text that the model made of it, a function's result as the user's.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part],
        Field(min_length=1),
        BeforeValidator(_parts, json_schema_input_type=str | Annotated[list[Part], Field(min_length=1)]),
        at_most(MAX_PARTS),
    ]

    @model_validator(mode="before")
    @classmethod
    def _call_as_text(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        if given.get("role") == "tool":
            return {"role": "user", "content": given.get("content")}
        calls = given.get("tool_calls")
        if given.get("role") != "assistant" or not isinstance(calls, list) or not calls:
            return given
        said = _parts(given.get("content") or [])
        if not isinstance(said, list):
            raise PydanticCustomError("content", "Content beside calls should be a text or a list of parts")
        return {"role": "assistant", "content": [*said, *_parts("\n".join(map(_call_text, calls)))]}


def _call_text(call: Any) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    name, arguments = (function.get(key) for key in ("name", "arguments")) if isinstance(function, Mapping) else (0, 0)
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise PydanticCustomError("tool_call", "A call needs a function with name and arguments, both texts")
    return f'{{"name":{json.dumps(name)},"arguments":{arguments}}}'


def _check_length(messages: list[ChatMessage]) -> list[ChatMessage]:
    length = sum(len(part.text or "") for message in messages for part in message.content)
    if length > MAX_TEXT:
        words = "The texts have {length} characters together; at most {most} are taken"
        raise PydanticCustomError("too_long", words, {"length": length, "most": MAX_TEXT})
    return messages


Messages = Annotated[list[ChatMessage], Field(min_length=1), at_most(MAX_MESSAGES), AfterValidator(_check_length)]


def _logprobs(value: Any) -> Any:
    """OpenAI's two fields in one: true asks for no alternatives, false for nothing."""
    return {True: 0, False: None}[value] if isinstance(value, bool) else value


class GenerateRequest(SamplingFields):
    """The body of /worker_generate_stream: LLaVA's `prompt` with its `images` (base64), or OpenAI's `messages`."""

    model: ModelName = ""
    prompt: str | None = Field(None, min_length=1, max_length=MAX_TEXT)
    messages: Messages | None = None
    images: list[str] = Field([], max_length=MAX_IMAGES)
    max_new_tokens: Whole = Field(DEFAULT_NEW_TOKENS, ge=1, le=1_000_000)
    logprobs: Annotated[int | None, BeforeValidator(_logprobs, json_schema_input_type=bool | int | None)] = Field(
        None, ge=0, le=MOST_LOGPROBS
    )
    return_token_ids: bool = False
    stream: bool = True
    request_id: Any = None

    def sampling(self) -> SamplingParams:
        """How to decode the answer."""
        return SamplingParams(**self.common(), max_new_tokens=self.max_new_tokens, logprobs=self.logprobs)

    def known_request_id(self) -> str | None:
        """The request's id, if it is one that a server of ours gave."""
        given = self.request_id
        return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else None


class AttentionMapRequest(GenerateRequest):
    """The body of /worker_attention_map: a request, and the ids of the answer to it."""

    token_ids: list[TokenId] = Field(min_length=1, max_length=MAX_ANSWER_IDS)


Address = Annotated[str, Field(max_length=512)]
QueueLength = Annotated[int, Field(ge=0, le=MOST_COUNTED)]

Line = Annotated[str, Field(max_length=500)]


class ModelCard(Fields):
    """What a worker says of its model, each in a line; None: its checkpoint doesn't tell."""

    base: Line | None = None
    language_model: Line | None = None
    tower: Line | None = None
    template: Line | None = None
    context: Line | None = None
    trained_on: Line | None = None
    training: Line | None = None


class WorkerStatus(Fields):
    """What a worker says of itself."""

    model_names: list[Annotated[ModelName, Field(min_length=1)]] = Field(min_length=1, max_length=64)
    speed: float = Field(1.0, ge=0, le=MOST_SPEED, allow_inf_nan=False)
    queue_length: QueueLength = 0
    card: ModelCard | None = None


class WorkerEntry(Fields):
    """The body of /register_worker and /unregister_worker; without a status the controller asks the worker itself."""

    worker_name: Address
    check_heart_beat: bool = True
    worker_status: WorkerStatus | None = None


class Heartbeat(Fields):
    worker_name: Address
    queue_length: QueueLength = 0


class WorkerWanted(Fields):
    """The body of /get_worker_address; `exclude` are addresses that the asker couldn't reach."""

    model: ModelName = ""
    exclude: list[Address] = Field([], max_length=1024)


class ForModel(Fields):
    """As much of a request as the controller has to know."""

    model: ModelName = ""
