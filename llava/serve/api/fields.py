"""What requests of all the API's routes have in common: fields that are ignored or refused, JSON answers, functions."""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, ConfigDict, Field

from llava.sampling_params import MOST_SCHEMA, Fields, SamplingFields, Whole
from llava.serve.api.choices import Choice
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.request_models import DEFAULT_NEW_TOKENS, ModelName, at_most

MAX_CHOICES = 16
MOST_TOOLS = 128
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class StreamOptions(Fields):
    include_usage: bool = False


class JsonSchema(Fields):
    name: str = Field("answer", max_length=64)
    strict: bool | None = None
    definition: dict[str, Any] = Field(_ANY_OBJECT, alias="schema")


class ResponseFormat(Fields):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def wanted(self) -> dict[str, Any] | None:
        """The schema of the answer; None for a text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return _ANY_OBJECT
        if self.json_schema is None:
            raise _bad("response_format: json_schema needs a schema")
        return self.json_schema.definition


def nested(kind: str) -> Callable[[Any], Any]:
    """/v1/responses has the fields of a `kind` (`function`, `json_schema`) by `type`; elsewhere they are inside."""

    def nest(given: Any) -> Any:
        if isinstance(given, dict) and given.get("type") == kind and kind not in given and len(given) > 1:
            return {"type": kind, kind: {name: value for name, value in given.items() if name != "type"}}
        return given

    return nest


def flat(given: Any) -> Any:
    """The other way round: as /v1/responses tells of it."""
    return {"type": given["type"], **given.get(given["type"], {})} if isinstance(given, dict) else given


class Function(Fields):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = _ANY_OBJECT


class Tool(Fields):
    type: Literal["function"]
    function: Function


NestedTool = Annotated[Tool, BeforeValidator(nested("function"))]
Tools = Annotated[list[NestedTool], at_most(MOST_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NestedTool


class Form(Protocol):
    """Writes the replies to one request, in a route's form."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The reply with all answers."""

    def events(self, steps: AsyncGenerator[Choice, None]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream of growing answers."""


class ApiRequest(SamplingFields):
    """Fields of every route that are honoured. One that would change the answer and isn't honoured is refused, not
    ignored; what OpenAI's or vLLM's server takes without a change of the answer is ignored here too."""

    model_config = ConfigDict(extra="allow")

    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "parallel_tool_calls",
            "reasoning_effort",
            "verbosity",
            "priority",
            "request_id",
        }
    )
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "best_of": (1,),
        "modalities": (["text"],),
        "min_tokens": (0,),
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "return_tokens_as_token_ids": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (True, False),
        "echo": (False,),
        "chat_template_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "functions": ([],),
        "function_call": ("none",),
    }
    """Values of fields of OpenAI's and vLLM's clients that change nothing and are accepted; null always is."""
    refused: ClassVar[frozenset[str]] = frozenset(
        {
            "audio",
            "prediction",
            "web_search_options",
            "suffix",
            "prompt_logprobs",
            "allowed_token_ids",
            "bad_words",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "structured_outputs",
            "chat_template",
        }
    )

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: Tools = Field([])
    tool_choice: ToolChoice | None = None

    def check(self) -> None:
        """Raises a ServeError (BAD_REQUEST) that names a field which can't be honoured."""
        for name, value in (self.model_extra or {}).items():
            if name in self.harmless or value in self.neutral.get(name, ()):
                continue
            known = name in self.neutral or name in self.refused
            shown = ascii(name)[1:-1][:60]
            words = f"{shown}: not supported here" if known else f"{shown}: unknown field"
            raise ServeError(ErrorType.BAD_REQUEST, words)
        if self.tools and self.tool_choice in (None, "auto"):
            raise _bad('tool_choice: auto is not supported here; give "required", "none" or the name of a function')
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise _bad("tool_choice: there are no tools to choose from")
        if self.callable_functions() and self.response_schema() is not None:
            raise _bad("response_format: it can't be given beside a function that has to be called")

    def worker_bodies(self, request_id: str) -> list[dict[str, Any]]:
        """The worker's request for each of the choices."""
        raise NotImplementedError

    def form(self, request_id: str) -> "Form":
        """What writes the replies."""
        raise NotImplementedError

    def callable_functions(self) -> tuple[Function, ...]:
        """Those of which the answer has to call one; none if it is a text."""
        functions = tuple(tool.function for tool in self.tools)
        if self.tool_choice == "required":
            return functions
        if not isinstance(self.tool_choice, Tool):
            return ()
        name = self.tool_choice.function.name
        chosen = tuple(function for function in functions if function.name == name)
        if not chosen:
            raise _bad(f"tool_choice: there is no tool {name!r}")
        return chosen

    def response_schema(self) -> dict[str, Any] | None:
        """The schema of an answer that is no call; None for a text."""
        return self.json_schema

    def sampling_body(self, choice: int = 0) -> dict[str, Any]:
        """How the worker is to decode the answer, of several choices that one."""
        body = self.common()
        functions = self.callable_functions()
        schema = calls_schema(functions) if functions else self.response_schema()
        if schema is not None:
            if len(json.dumps(schema)) > MOST_SCHEMA:
                raise _bad(f"tools: their schemas are longer than the {MOST_SCHEMA} characters allowed")
            body["json_schema"] = schema
        if self.seed is not None:
            body["seed"] = _later_seed(self.seed, choice)
        return body | {"model": self.model, "max_new_tokens": DEFAULT_NEW_TOKENS, "stream": self.stream}


class ChoicesRequest(ApiRequest):
    """Of the routes that give several answers."""

    n: Whole = Field(1, ge=1, le=MAX_CHOICES)
    response_format: ResponseFormat | None = None

    def response_schema(self) -> dict[str, Any] | None:
        wanted = self.response_format.wanted() if self.response_format else None
        return self.json_schema if wanted is None else wanted


def calls_schema(functions: tuple[Function, ...]) -> dict[str, Any]:
    """The schema of a call: of one function its arguments, of several an object of name and arguments."""
    if len(functions) == 1:
        return functions[0].parameters or _ANY_OBJECT
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for place, function in enumerate(functions):
        # A document of its own: what refers to its root ("#/…") goes on meaning that one. Draft 4 says "id".
        name = f"urn:function:{place}"
        definitions[f"{place}"] = (function.parameters or _ANY_OBJECT) | {"$id": name, "id": name}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/{place}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": definitions}


class Call:
    """An answer that is the call of a function, read as it grows."""

    def __init__(self, functions: tuple[Function, ...]):
        self._functions = functions
        self.name: str | None = functions[0].name if len(functions) == 1 else None

    def arguments(self, text: str, is_whole: bool) -> str:
        """The arguments in `text`, the answer so far; `name` is known once there are any."""
        if len(self._functions) == 1:
            return text
        for function in self._functions:
            begin = f'{{"name":{json.dumps(function.name)},"arguments":'
            if text.startswith(begin):
                self.name = function.name
                inner = text[len(begin) :]
                # The last sign may be the outer object's end.
                return inner[:-1] if not is_whole or inner.endswith("}") else inner
        return ""


def _later_seed(seed: int, choice: int) -> int:
    """The greatest seed is followed by the smallest ones."""
    return seed + choice if seed + choice < 1 << 64 else seed + choice - (1 << 64)


def _bad(words: str) -> ServeError:
    return ServeError(ErrorType.BAD_REQUEST, words)
