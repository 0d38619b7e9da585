"""/v1/responses: OpenAI's newer form, without its memory: a request brings the whole conversation."""

import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llava.sampling_params import MOST_LOGPROBS, Fields, Whole
from llava.serve.api.chat import token_with_others
from llava.serve.api.choices import Choice, sum_usage, time_of_day
from llava.serve.api.encoding import beside_loop
from llava.serve.api.fields import ApiRequest, Call, ResponseFormat, flat, nested
from llava.serve.protocol import MOST_ENTRIES, ErrorType, ServeError
from llava.serve.request_models import (
    DEFAULT_NEW_TOKENS,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TEXT,
    ImageOptionsField,
    Messages,
    at_most,
)
from llava.serve.transport.bodies import validated


class InputPart(Fields):
    type: Literal["input_text", "input_image", "output_text", "text"]
    text: str | None = Field(None, max_length=MAX_TEXT)
    image_url: str | None = None
    image_options: ImageOptionsField = None


def _parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


class InputItem(Fields):
    """A message, a call that the model made, or what the called function gave back."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Annotated[
        list[InputPart] | None,
        BeforeValidator(_parts, json_schema_input_type=str | list[InputPart] | None),
        at_most(MAX_PARTS),
    ] = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = Field(None, max_length=MAX_TEXT)
    output: Annotated[
        list[InputPart] | None,
        BeforeValidator(_parts, json_schema_input_type=str | list[InputPart] | None),
        at_most(MAX_PARTS),
    ] = None

    def message(self, place: int) -> dict[str, Any]:
        """As one of OpenAI's chat messages."""
        if self.type == "function_call":
            return {"role": "assistant", "tool_calls": [{"function": {"name": self.name, "arguments": self.arguments}}]}
        if self.type == "function_call_output":
            parts = [_chat_part(part) for part in self.output or ()]
            return {"role": "tool", "content": parts or "", "tool_call_id": ""}
        if self.role is None or self.content is None:
            raise ServeError(ErrorType.BAD_REQUEST, f"input.{place}: a message needs role and content")
        return {"role": self.role, "content": [_chat_part(part) for part in self.content]}


def _chat_part(part: InputPart) -> dict[str, Any]:
    if part.type == "input_image":
        return {"type": "image_url", "image_url": part.image_url, "image_options": part.image_options}
    return {"type": "text", "text": part.text}


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ChatMessages(Fields):
    """A request's input as chat messages, which is the form that a worker takes."""

    messages: Messages


class TextOptions(Fields):
    format: Annotated[ResponseFormat | None, BeforeValidator(nested("json_schema"))] = None


class ResponsesRequest(ApiRequest):
    harmless: ClassVar[frozenset[str]] = ApiRequest.harmless | {"reasoning", "include", "client_metadata"}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = ApiRequest.neutral | {
        "truncation": ("disabled", "auto"),
        "background": (False,),
    }
    refused: ClassVar[frozenset[str]] = ApiRequest.refused | {"previous_response_id", "conversation", "prompt"}

    input: Annotated[
        list[InputItem],
        Field(min_length=1),
        BeforeValidator(_items, json_schema_input_type=str | Annotated[list[InputItem], Field(min_length=1)]),
        at_most(MAX_MESSAGES),
    ]
    instructions: str | None = Field(None, max_length=MAX_TEXT)
    max_output_tokens: Whole | None = Field(None, ge=1, le=1_000_000)
    top_logprobs: Whole | None = Field(None, ge=0, le=MOST_LOGPROBS)
    text: TextOptions | None = None

    def response_schema(self) -> dict[str, Any] | None:
        wanted = self.text.format.wanted() if self.text and self.text.format else None
        return self.json_schema if wanted is None else wanted

    def worker_bodies(self, request_id: str) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += [item.message(place) for place, item in enumerate(self.input) if item.type != "reasoning"]
        chat = validated({"messages": messages}, ChatMessages)
        return [
            self.sampling_body()
            | {
                "messages": [message.model_dump(exclude_none=True) for message in chat.messages],
                "max_new_tokens": self.max_output_tokens or DEFAULT_NEW_TOKENS,
                "logprobs": self.top_logprobs,
                "request_id": request_id,
            }
        ]

    def form(self, request_id: str) -> "ResponsesForm":
        return ResponsesForm(self, request_id)


class ResponsesForm:
    """Writes the replies to one request."""

    def __init__(self, request: ResponsesRequest, request_id: str):
        self.request = request
        self.id = request_id.removeprefix("req-")
        self.functions = request.callable_functions()
        self.call = Call(self.functions) if self.functions else None
        self.created = time_of_day()
        self.call_id = "call_" + secrets.token_hex(12)
        self.number = -1

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        (choice,) = choices
        status = "completed" if choice.finish_reason == "stop" else "incomplete"
        usage = sum_usage(choices)
        return self._response(status, [self._item(choice, status)]) | {
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": usage["cached_tokens"]},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
            }
        }

    async def events(self, steps: AsyncGenerator[Choice, None]) -> AsyncGenerator[dict[str, Any], None]:
        logprobs: list[dict[str, Any]] = []
        waiting: list[dict[str, Any]] = []
        """Of steps that show nothing yet."""
        is_begun, said, choice = False, 0, Choice(0)
        async for choice in steps:
            logprobs += choice.logprobs
            choice.logprobs = waiting = waiting + choice.logprobs
            content = self._content(choice)
            # Which function is called has to be known before anything is said of the call.
            if not is_begun and (self.call is None or self.call.name or choice.is_whole):
                for event in self._opening():
                    yield event
                is_begun = True
            new, said = content[said:], max(said, len(content))
            if new:
                yield self._delta(new, choice)
                waiting = []
        choice.logprobs = logprobs
        whole = await beside_loop(len(logprobs) > MOST_ENTRIES, self.whole, [choice])
        for event in self._closing(whole["output"][0]):
            yield event
        yield self._event(f"response.{whole['status']}", response=whole)

    def _opening(self) -> list[dict[str, Any]]:
        empty = self._item(Choice(0), "in_progress")
        if self.call is None:
            empty["content"] = []
        events = [
            self._event("response.created", response=self._response("in_progress", [])),
            self._event("response.in_progress", response=self._response("in_progress", [])),
            self._event("response.output_item.added", output_index=0, item=empty),
        ]
        if self.call is None:
            events.append(self._event("response.content_part.added", **self._place(), part=self._part(Choice(0))))
        return events

    def _delta(self, new: str, choice: Choice) -> dict[str, Any]:
        if self.call is not None:
            where = {"item_id": "fc_" + self.id, "output_index": 0}
            return self._event("response.function_call_arguments.delta", **where, delta=new)
        logprobs = self._part(choice)["logprobs"]
        return self._event("response.output_text.delta", **self._place(), delta=new, logprobs=logprobs)

    def _closing(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        done = self._event  # numbered in the order in which they are made
        if self.call is not None:
            where = {"item_id": item["id"], "output_index": 0}
            told = {"arguments": item["arguments"], "name": item["name"]}
            events = [done("response.function_call_arguments.done", **where, **told)]
        else:
            (part,) = item["content"]
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [done("response.output_text.done", **self._place(), **told)]
            events.append(done("response.content_part.done", **self._place(), part=part))
        return [*events, done("response.output_item.done", output_index=0, item=item)]

    def _content(self, choice: Choice) -> str:
        return choice.text if self.call is None else self.call.arguments(choice.text, choice.is_whole)

    def _item(self, choice: Choice, status: str) -> dict[str, Any]:
        if self.call is None:
            item = {"type": "message", "id": "msg_" + self.id, "role": "assistant", "status": status}
            return item | {"content": [self._part(choice)]}
        arguments = self._content(choice)
        return {
            "type": "function_call",
            "id": "fc_" + self.id,
            "call_id": self.call_id,
            "name": self.call.name or "",
            "arguments": arguments,
            "status": status,
        }

    def _part(self, choice: Choice) -> dict[str, Any]:
        is_wanted = self.request.top_logprobs is not None
        logprobs = [token_with_others(entry) for entry in choice.logprobs] if is_wanted else []
        return {"type": "output_text", "text": choice.text, "annotations": [], "logprobs": logprobs}

    def _place(self) -> dict[str, Any]:
        return {"item_id": "msg_" + self.id, "output_index": 0, "content_index": 0}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        request = self.request
        given = request.model_dump(
            mode="json", by_alias=True, exclude_none=True, include={"tools", "tool_choice", "text"}
        )
        return {
            "id": "resp_" + self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": request.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": flat(given.get("text", {}).get("format", {"type": "text"}))},
            "tool_choice": flat(given.get("tool_choice", "none")),
            "tools": [flat(tool) for tool in given.get("tools", [])],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            "metadata": (request.model_extra or {}).get("metadata") or {},
        }

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self.number += 1
        return {"type": kind, "sequence_number": self.number} | content
