"""What the servers take and answer, as OpenAPI documents: bodies are the pydantic models that check them.

The API serves its own at /openapi.json, and `python -m llava.serve.openai_api_server --openapi` prints it. Controller
and worker, which only the project's own processes speak to, have one for the tests that send them mutated requests.
"""

import functools
import importlib.metadata
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, create_model
from pydantic.json_schema import models_json_schema

from llava.serve.api.chat import ChatRequest
from llava.serve.api.completions import CompletionRequest
from llava.serve.api.responses import ResponsesRequest
from llava.serve.conversation_log import HEADER as LOG_HEADER
from llava.serve.conversation_log import notice
from llava.serve.protocol import ErrorType
from llava.serve.request_models import (
    AttentionMapRequest,
    GenerateRequest,
    Heartbeat,
    WorkerEntry,
    WorkerStatus,
    WorkerWanted,
)
from llava.serve.secret import HEADER
from llava.serve.transport.middleware import LIVENESS
from llava.serve.worker_answers import SeenImages

Server = Literal["api", "controller", "worker"]


class ErrorContent(BaseModel):
    message: str
    type: ErrorType
    param: None
    code: ErrorType
    error_code: int
    request_id: str


class ErrorAnswer(BaseModel):
    """Every answer but 200."""

    error: ErrorContent


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelEntry]


class Message(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[dict[str, Any]] = []


class Choice(BaseModel):
    index: int
    message: Message
    finish_reason: str
    logprobs: dict[str, Any] | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Response(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class Health(BaseModel):
    status: Literal["ok"]


class Ready(BaseModel):
    status: Literal["ready"]
    models: list[str]


Models = create_model("Models", models=list[str])
ModelsNow = create_model("ModelsNow", models=list[str], is_new=bool)
Registered = create_model("Registered", registered=str)
Unregistered = create_model("Unregistered", unregistered=str)
Address = create_model("Address", address=str, is_new=bool)
Exists = create_model("Exists", exist=bool)
Workers = create_model("Workers", workers=list[dict[str, Any]])


@dataclass(frozen=True)
class Operation:
    """One route: the model of its body, the type of its answer (None: a text or stream of that media type)."""

    method: Literal["get", "post"]
    path: str
    summary: str
    body: type[BaseModel] | None = None
    answer: Any = None
    media_type: str = "application/json"
    stream: str | None = None  # the media type of the other form of its answer


_HEALTH = Operation("get", LIVENESS, "Whether the process answers; needs no key.", answer=Health)
_CHUNKS = "application/octet-stream"
_EVENTS = "text/event-stream"
OPERATIONS: dict[Server, tuple[Operation, ...]] = {
    "api": (
        _HEALTH,
        Operation("get", "/ready", "Whether a model can be asked.", answer=Ready),
        Operation("get", "/metrics", "Counters in Prometheus's form.", media_type="text/plain"),
        Operation("get", "/openapi.json", "This document.", answer=dict[str, Any]),
        Operation("get", "/v1/models", "The models that can be asked.", answer=ModelList),
        Operation("get", "/v1/models/{name}", "One of them.", answer=ModelEntry),
        Operation("post", "/v1/chat/completions", "An answer.", ChatRequest, Completion, stream=_EVENTS),
        Operation("post", "/v1/completions", "A text gone on with.", CompletionRequest, TextCompletion, stream=_EVENTS),
        Operation("post", "/v1/responses", "An answer, in the newer form.", ResponsesRequest, Response, stream=_EVENTS),
    ),
    "controller": (
        _HEALTH,
        Operation("post", "/register_worker", "A worker joins.", WorkerEntry, Registered),
        Operation("post", "/unregister_worker", "A worker leaves.", WorkerEntry, Unregistered),
        Operation("post", "/refresh_all_workers", "Ask every worker how it is.", answer=Models),
        Operation("post", "/list_models", "The models that can be asked.", answer=ModelsNow),
        Operation("post", "/get_worker_address", "Where a model is.", WorkerWanted, Address),
        Operation("post", "/list_workers", "All that is known of the workers.", answer=Workers),
        Operation("post", "/receive_heart_beat", "A worker is alive.", Heartbeat, Exists),
        Operation("post", "/worker_get_status", "All workers as one.", answer=dict[str, Any]),
        Operation("post", "/worker_generate_stream", "An answer.", GenerateRequest, media_type=_CHUNKS),
    ),
    "worker": (
        _HEALTH,
        Operation("post", "/worker_get_status", "What the worker says of itself.", answer=WorkerStatus),
        Operation("post", "/worker_generate_stream", "An answer.", GenerateRequest, media_type=_CHUNKS),
        Operation("post", "/worker_attention_map", "Where the model looked.", AttentionMapRequest, dict[str, Any]),
        Operation("post", "/worker_seen_images", "The images as the model sees them.", GenerateRequest, SeenImages),
    ),
}


@functools.cache
def document(server: Server, kept_days: float | None = None) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server, which says for how many days conversations are kept if they are."""
    bodies = {operation.body for operation in OPERATIONS[server] if operation.body}
    template = "#/components/schemas/{model}"
    ordered = sorted(bodies, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in ordered], ref_template=template)
    paths: dict[str, dict] = {}
    for operation in OPERATIONS[server]:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    scheme = {"type": "apiKey", "in": "header", "name": HEADER}
    if server == "api":
        scheme = {"type": "http", "scheme": "bearer"}
    info = {"title": f"LLaVA-Med: {server}", "version": importlib.metadata.version("llava-med")}
    if kept_days is not None:
        info["description"] = f"{notice(kept_days)} Every answer says so in the header {LOG_HEADER}."
    return {
        "openapi": "3.1.0",
        "info": info,
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "responses": {"Error": {"description": "What went wrong.", "content": _content(ErrorAnswer)}},
            "securitySchemes": {"key": scheme},
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    content = {operation.media_type: {"schema": {"type": "string"}}}
    if operation.answer is not None:
        content = _content(operation.answer)
    if operation.stream:
        content[operation.stream] = {"schema": {"type": "string"}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "It went well.", "content": content},
            "default": {"$ref": "#/components/responses/Error"},
        },
    }
    if operation.path == LIVENESS:
        described["security"] = []
    if "{name}" in operation.path:
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.body is not None:
        schema = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described


def _content(kind: Any) -> dict[str, Any]:
    """An answer's schema with every reference replaced by what it refers to."""
    schema = TypeAdapter(kind).json_schema(mode="serialization")
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inline(definitions[value["$ref"].rpartition("/")[2]])
            return {name: inline(each) for name, each in value.items()}
        return [inline(each) for each in value] if isinstance(value, list) else value

    return {"application/json": {"schema": inline(schema)}}
