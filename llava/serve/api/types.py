"""OpenAI's chat completion requests and replies: fields read and checked, replies written."""

import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llava.serve.protocol import ErrorType, ServeError

MAX_CHOICES = 16


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields that are honoured. One that would change the answer and isn't honoured is refused, not ignored."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    ignore_eos: bool = False
    """Not OpenAI's: go on to the last token whatever the model says, for measurements."""
    stream: bool = False
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Raises a ServeError (BAD_REQUEST) that names a field which can't be honoured."""
        for name, value in (self.model_extra or {}).items():
            if name in _HARMLESS or value in _NEUTRAL.get(name, (None,)):
                continue
            known = name in _NEUTRAL or name in _REFUSED
            words = f"{name}: not supported here" if known else f"{name}: unknown field"
            raise ServeError(ErrorType.BAD_REQUEST, words)
        if self.top_logprobs is not None and not self.logprobs:
            raise ServeError(ErrorType.BAD_REQUEST, "top_logprobs: needs logprobs true")

    def worker_body(self, choice: int, request_id: str) -> dict[str, Any]:
        """The worker's request for one of the `n` choices."""
        return {
            "model": self.model,
            "messages": self.messages,
            "temperature": self.temperature or 0.0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "stop": self.stop,
            "seed": None if self.seed is None else self.seed + choice,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "ignore_eos": self.ignore_eos,
            "stream": self.stream,
            "request_id": request_id,
        }


_HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
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
        "created": int(time.time()),
        "model": model,
        "choices": choices,
    }
