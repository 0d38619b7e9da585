"""/v1/completions: a text to go on with, in OpenAI's older form.

`images` (base64 or data: URLs) are this project's: one for each `<image>` of the text.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llava.sampling_params import MOST_LOGPROBS, Whole
from llava.serve.api.chat import token_bytes, usage_of
from llava.serve.api.choices import Choice, time_of_day
from llava.serve.api.fields import ChoicesRequest
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.request_models import MAX_IMAGES, MAX_TEXT

DEFAULT_TOKENS = 16


def _one_text(prompt: Any) -> Any:
    """A list of one text is that text."""
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt


class CompletionRequest(ChoicesRequest):
    prompt: Annotated[
        str,
        BeforeValidator(_one_text, json_schema_input_type=str | list[str]),
        Field(min_length=1, max_length=MAX_TEXT),
    ]
    images: list[str] = Field([], max_length=MAX_IMAGES)
    max_tokens: Whole = Field(DEFAULT_TOKENS, ge=1, le=1_000_000)
    logprobs: Whole | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def check(self) -> None:
        super().check()
        if self.tools:
            raise ServeError(ErrorType.BAD_REQUEST, "tools: they belong to chat completions")

    def worker_bodies(self, request_id: str) -> list[dict[str, Any]]:
        common = {
            "prompt": self.prompt,
            "images": self.images,
            "max_new_tokens": self.max_tokens,
            "logprobs": self.logprobs,
            "request_id": request_id,
        }
        return [self.sampling_body(choice) | common for choice in range(self.n)]

    def form(self, request_id: str) -> "CompletionForm":
        return CompletionForm(self, request_id)


class CompletionForm:
    """Writes the replies to one request."""

    def __init__(self, request: CompletionRequest, request_id: str):
        self.request = request
        self.lengths = [0] * request.n
        self.envelope = {
            "id": "cmpl-" + request_id.removeprefix("req-"),
            "object": "text_completion",
            "created": time_of_day(),
            "model": request.model,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        written = [self._choice(choice, choice.text) for choice in choices]
        return self.envelope | {"choices": written, "usage": usage_of(choices)}

    async def events(self, steps: AsyncGenerator[Choice, None]) -> AsyncGenerator[dict[str, Any], None]:
        whole = []
        async for choice in steps:
            if choice.is_whole:
                whole.append(choice)
            yield self.envelope | {"choices": [self._choice(choice, choice.delta)]}
        if self.request.stream_options and self.request.stream_options.include_usage:
            yield self.envelope | {"choices": [], "usage": usage_of(whole)}

    def _choice(self, choice: Choice, text: str) -> dict[str, Any]:
        logprobs = self._logprobs(choice) if self.request.logprobs is not None else None
        return {"index": choice.index, "text": text, "finish_reason": choice.finish_reason, "logprobs": logprobs}

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        offsets = []
        for entry in choice.logprobs:
            offsets.append(self.lengths[choice.index])
            # Characters that begin in it.
            self.lengths[choice.index] += sum(byte & 0xC0 != 0x80 for byte in token_bytes(entry))
        return {
            "tokens": [_name(entry) for entry in choice.logprobs],
            "token_logprobs": [entry["logprob"] for entry in choice.logprobs],
            "top_logprobs": [{_name(one): one["logprob"] for one in entry["top"]} for entry in choice.logprobs],
            "text_offset": offsets,
        }


def _name(entry: dict[str, Any]) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI writes them."""
    try:
        return token_bytes(entry).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(entry))
