"""OpenAI's chat completion requests and replies: fields read and checked, replies written."""

import time
from typing import Any

from pydantic import ConfigDict, Field

from llava.sampling_params import MOST_LOGPROBS, Fields, SamplingFields, Whole
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.request_models import DEFAULT_NEW_TOKENS, Messages, ModelName

MAX_CHOICES = 16


class StreamOptions(Fields):
    include_usage: bool = False


class ChatRequest(SamplingFields):
    """The fields that are honoured. One that would change the answer and isn't honoured is refused, not ignored."""

    model_config = ConfigDict(extra="allow")

    model: ModelName
    messages: Messages
    max_tokens: Whole | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(None, ge=0, le=MOST_LOGPROBS)
    n: Whole = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Raises a ServeError (BAD_REQUEST) that names a field which can't be honoured."""
        for name, value in (self.model_extra or {}).items():
            if name in _HARMLESS or value in _NEUTRAL.get(name, ()):
                continue
            known = name in _NEUTRAL or name in _REFUSED
            shown = ascii(name)[1:-1][:60]
            words = f"{shown}: not supported here" if known else f"{shown}: unknown field"
            raise ServeError(ErrorType.BAD_REQUEST, words)
        if self.top_logprobs is not None and not self.logprobs:
            raise ServeError(ErrorType.BAD_REQUEST, "top_logprobs: needs logprobs true")

    def worker_body(self, choice: int, request_id: str) -> dict[str, Any]:
        """The worker's request for one of the `n` choices."""
        return self.common() | {
            "model": self.model,
            "messages": [message.model_dump(exclude_none=True) for message in self.messages],
            "max_new_tokens": self.max_completion_tokens or self.max_tokens or DEFAULT_NEW_TOKENS,
            "seed": None if self.seed is None else _later_seed(self.seed, choice),
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "stream": self.stream,
            "request_id": request_id,
        }


def _later_seed(seed: int, choice: int) -> int:
    """The greatest seed is followed by the smallest ones."""
    return seed + choice if seed + choice < 1 << 64 else seed + choice - (1 << 64)


_HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
}
"""What says nothing, by OpenAI's clients and by vLLM's; null never does."""
_REFUSED = {"functions", "function_call", "audio", "prediction", "reasoning_effort", "web_search_options", "verbosity"}


def completion(request_id: str, model: str, choices: list[dict], usage: dict) -> dict[str, Any]:
    """A whole reply."""
    return _envelope(request_id, model, "chat.completion", choices) | {"usage": usage}


def completion_chunk(request_id: str, model: str, choices: list[dict], usage: dict | None = None) -> dict[str, Any]:
    """One event of a stream."""
    chunk = _envelope(request_id, model, "chat.completion.chunk", choices)
    return chunk if usage is None else chunk | {"usage": usage}


def sum_usage(usages: list[dict[str, int]]) -> dict[str, Any]:
    """The account of all choices: the prompt is counted once."""
    prompt = max((usage["prompt_tokens"] for usage in usages), default=0)
    answered = sum(usage["completion_tokens"] for usage in usages)
    cached = max((usage.get("cached_tokens", 0) for usage in usages), default=0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def choice_logprobs(entries: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """A worker's logprobs in OpenAI's form."""
    if entries is None:
        return None
    content = [
        _token(entry) | {"top_logprobs": [_token(alternative) for alternative in entry["top"]]} for entry in entries
    ]
    return {"content": content, "refusal": None}


def model_entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llava"}


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "token": entry["token"],
        "logprob": entry["logprob"],
        "bytes": list(entry["token"].encode("utf-8", "replace")),
    }


def _envelope(request_id: str, model: str, kind: str, choices: list[dict]) -> dict[str, Any]:
    return {
        "id": "chatcmpl-" + request_id.removeprefix("req-"),
        "object": kind,
        "created": int(time.time()),  # noqa: TID251
        "model": model,
        "choices": choices,
    }
