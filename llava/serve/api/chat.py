"""/v1/chat/completions: OpenAI's chat requests read and checked, replies and streams of chunks written."""

import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from pydantic import Field

from llava.sampling_params import MOST_LOGPROBS, Whole
from llava.serve.api.choices import Choice, sum_usage, time_of_day
from llava.serve.api.fields import Call, ChoicesRequest
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.request_models import DEFAULT_NEW_TOKENS, Messages


class ChatRequest(ChoicesRequest):
    messages: Messages
    max_tokens: Whole | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ServeError(ErrorType.BAD_REQUEST, "top_logprobs: needs logprobs true")

    def worker_bodies(self, request_id: str) -> list[dict[str, Any]]:
        """The worker's request for each of the `n` choices."""
        common = {
            "messages": [message.model_dump(exclude_none=True) for message in self.messages],
            "max_new_tokens": self.max_completion_tokens or self.max_tokens or DEFAULT_NEW_TOKENS,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "request_id": request_id,
        }
        return [self.sampling_body(choice) | common for choice in range(self.n)]

    def form(self, request_id: str) -> "ChatForm":
        return ChatForm(self, request_id)


class ChatForm:
    """Writes the replies to one request."""

    def __init__(self, request: ChatRequest, request_id: str):
        self.request = request
        self.functions = request.callable_functions()
        self.envelope = {
            "id": "chatcmpl-" + request_id.removeprefix("req-"),
            "created": time_of_day(),
            "model": request.model,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return self.envelope | {
            "object": "chat.completion",
            "choices": [
                {
                    "index": choice.index,
                    "message": self._message(choice),
                    "finish_reason": self._reason(choice),
                    "logprobs": self._logprobs(choice),
                }
                for choice in choices
            ],
            "usage": usage_of(choices),
        }

    async def events(self, steps: AsyncGenerator[Choice, None]) -> AsyncGenerator[dict[str, Any], None]:
        deltas = [Deltas(self.functions) for _ in range(self.request.n)]
        whole = []
        # Of steps that show nothing yet, as before a function's name is known: they go with the next one.
        waiting: list[list[dict[str, Any]]] = [[] for _ in deltas]
        async for choice in steps:
            if choice.is_whole:
                whole.append(choice)
            choice.logprobs = waiting[choice.index] = waiting[choice.index] + choice.logprobs
            for delta in deltas[choice.index].of(choice):
                waiting[choice.index] = []
                yield self._chunk([self._delta(choice, delta)])
        if self.request.stream_options and self.request.stream_options.include_usage:
            yield self._chunk([]) | {"usage": usage_of(whole)}

    def _message(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if self.functions:
            call = Call(self.functions)
            arguments = call.arguments(choice.text, is_whole=True)
            function = {"name": call.name or "", "arguments": arguments}
            message |= {"content": None, "tool_calls": [{"id": _call_id(), "type": "function", "function": function}]}
        return message

    def _delta(self, choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": delta,
            "finish_reason": self._reason(choice),
            "logprobs": self._logprobs(choice),
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.envelope | {"object": "chat.completion.chunk", "choices": choices}

    def _reason(self, choice: Choice) -> str | None:
        # As OpenAI has it: a function that was named beforehand is no decision of the model's.
        is_decision = self.request.tool_choice == "required" and choice.finish_reason == "stop"
        return "tool_calls" if is_decision else choice.finish_reason

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        return token_logprobs(choice.logprobs) if self.request.logprobs else None


class Deltas:
    """What each step adds to one choice's message."""

    def __init__(self, functions: tuple):
        self.call = Call(functions) if functions else None
        self.is_begun = False
        self.said = 0
        """Characters of the arguments."""

    def of(self, choice: Choice) -> Iterator[dict[str, Any]]:
        role: dict[str, Any] = {} if self.is_begun else {"role": "assistant"}
        if self.call is None:
            self.is_begun = True
            yield role | {"content": choice.delta}
            return
        arguments = self.call.arguments(choice.text, choice.is_whole)
        new, self.said = arguments[self.said :], max(self.said, len(arguments))
        if not (new or choice.is_whole):
            return
        entry: dict[str, Any] = {"index": 0, "function": {"arguments": new}}
        if not self.is_begun:
            entry |= {"id": _call_id(), "type": "function"}
            entry["function"] = {"name": self.call.name or "", "arguments": new}
            role["content"] = None
        self.is_begun = True
        yield role | {"tool_calls": [entry]}


def usage_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """OpenAI's account of all choices."""
    usage = sum_usage(choices)
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
    }


def token_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A worker's logprobs in OpenAI's form."""
    content = [token_with_others(entry) for entry in entries]
    return {"content": content, "refusal": None}


def token_with_others(entry: dict[str, Any]) -> dict[str, Any]:
    return token(entry) | {"top_logprobs": [token(other) for other in entry["top"]]}


def token(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": list(token_bytes(entry))}


def token_bytes(entry: dict[str, Any]) -> bytes:
    """What a token is in UTF-8, which may be a part of a character."""
    given = entry.get("bytes")
    return entry["token"].encode("utf-8", "replace") if given is None else bytes(given)


def _call_id() -> str:
    return "call_" + secrets.token_hex(12)
