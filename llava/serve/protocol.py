"""The wire protocol between controller, workers and their clients, as LLaVA's serving speaks it.

A stream is JSON objects, each ended by a zero byte: {"text": prompt so far + generated, "error_code": 0}. An error
carries a non-zero code and words; ours add `error_type` and `request_id`.
"""

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llava.errors import LlavaError

KEEP_ALIVE_SECONDS = 75
"""How long servers keep a silent connection: longer than any client of ours, which would else use one that is gone."""
END_OF_CHUNK = b"\0"
MOST_ENTRIES = 32
"""Tokens with logprobs in one chunk of a stream: so many, with 20 others each, are written and read in milliseconds."""
_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\]):(?P<port>[0-9]{1,5})/*",
    re.ASCII | re.IGNORECASE,
)


class ErrorType(StrEnum):
    """What can go wrong for a client. Each has one code of the old protocol and one HTTP status."""

    NO_WORKER = "no_worker"
    NO_MODEL = "model_not_found"
    WORKER_LOST = "worker_lost"
    QUEUE_FULL = "queue_full"
    OUT_OF_MEMORY = "out_of_memory"
    CONTEXT_TOO_LONG = "context_too_long"
    BAD_IMAGE = "bad_image"
    BAD_REQUEST = "bad_request"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    UNAUTHORIZED = "unauthorized"
    TOO_LARGE = "too_large"
    HEADERS_TOO_LARGE = "headers_too_large"
    SLOW = "request_timeout"
    BUSY = "too_many_connections"
    FULL = "server_busy"
    UNKNOWN_HOST = "unknown_host"
    FOREIGN_ORIGIN = "foreign_origin"
    RATE_LIMITED = "rate_limited"
    NO_ROUTE = "no_such_route"
    WRONG_METHOD = "method_not_allowed"
    INTERNAL = "internal_error"


@dataclass(frozen=True)
class ErrorKind:
    code: int  # of the streaming protocol
    status: int  # of HTTP
    words: str  # shown where there is nothing more exact to say
    retry_after: float | None = None  # seconds after which asking again makes sense


ERRORS: dict[ErrorType, ErrorKind] = {
    ErrorType.NO_WORKER: ErrorKind(50003, 503, "No worker is ready for this model. Wait until one has loaded."),
    ErrorType.NO_MODEL: ErrorKind(40402, 404, "There is no such model. /v1/models lists those that can be asked."),
    ErrorType.WORKER_LOST: ErrorKind(50004, 502, "The worker stopped while it was answering. Ask again."),
    ErrorType.QUEUE_FULL: ErrorKind(50005, 429, "The queue is full. Ask again in a moment.", 1.0),
    ErrorType.OUT_OF_MEMORY: ErrorKind(50002, 507, "The worker ran out of memory on this request."),
    ErrorType.CONTEXT_TOO_LONG: ErrorKind(40303, 400, "The conversation is longer than the model's context."),
    ErrorType.BAD_IMAGE: ErrorKind(40001, 400, "The image can't be read."),
    ErrorType.BAD_REQUEST: ErrorKind(40000, 400, "The request is not valid."),
    ErrorType.TIMEOUT: ErrorKind(50006, 504, "No answer in time."),
    ErrorType.CANCELLED: ErrorKind(49900, 499, "Cancelled."),
    ErrorType.UNAUTHORIZED: ErrorKind(40101, 401, "The key or secret is missing or wrong."),
    ErrorType.TOO_LARGE: ErrorKind(41300, 413, "The request is too large."),
    ErrorType.HEADERS_TOO_LARGE: ErrorKind(43100, 431, "The request's headers are too large or too many."),
    ErrorType.SLOW: ErrorKind(40800, 408, "The request came too slowly."),
    ErrorType.BUSY: ErrorKind(50301, 503, "The server has all the connections it takes. Try again in a moment.", 1.0),
    ErrorType.FULL: ErrorKind(50302, 503, "The server holds as much as it takes. Ask again in a moment.", 1.0),
    ErrorType.UNKNOWN_HOST: ErrorKind(42100, 421, "This server doesn't answer to that name (--allowed-host)."),
    ErrorType.FOREIGN_ORIGIN: ErrorKind(40301, 403, "Pages of other sites may not ask this server."),
    ErrorType.RATE_LIMITED: ErrorKind(42901, 429, "Too many requests for this key. Ask again in a moment."),
    ErrorType.NO_ROUTE: ErrorKind(40400, 404, "There is nothing at this path."),
    ErrorType.WRONG_METHOD: ErrorKind(40500, 405, "This path doesn't take that method."),
    ErrorType.INTERNAL: ErrorKind(50001, 500, "Something failed in the server; its log has the request id."),
}


TRY_ANOTHER = (ErrorType.NO_WORKER, ErrorType.QUEUE_FULL, ErrorType.FULL)
"""Errors of a worker that is stopping, or has enough to do: another one may answer."""


class ServeError(Exception):
    """An error on its way to a client: a type, words that are safe to show, seconds to wait if that helps, and the
    methods that a path takes if it was asked with another."""

    def __init__(
        self,
        error_type: ErrorType,
        words: str | None = None,
        retry_after: float | None = None,
        allow: str | None = None,
    ):
        super().__init__(words or ERRORS[error_type].words)
        self.error_type = error_type
        self.allow = allow
        self.retry_after = ERRORS[error_type].retry_after if retry_after is None else retry_after

    @property
    def status(self) -> int:
        return ERRORS[self.error_type].status

    @property
    def headers(self) -> dict[str, str]:
        """The further headers of an answer with this error."""
        retry = {} if self.retry_after is None else {"retry-after": str(max(1, round(self.retry_after)))}
        return retry if self.allow is None else retry | {"allow": self.allow}


def encode_chunk(text: str, **more: Any) -> bytes:
    """One chunk of a stream that goes well."""
    return json.dumps({"text": text, "error_code": 0, **more}, ensure_ascii=False).encode() + END_OF_CHUNK


def encode_error(error: ServeError, request_id: str) -> bytes:
    """The last chunk of a stream that fails."""
    kind = ERRORS[error.error_type]
    content = {
        "text": str(error),
        "error_code": kind.code,
        "error_type": error.error_type.value,
        "request_id": request_id,
    }
    return json.dumps(content, ensure_ascii=False).encode() + END_OF_CHUNK


def decode_error(chunk: dict) -> ServeError:
    """The error that a chunk with a non-zero code carries, also from a worker that sends no `error_type`."""
    try:
        error_type = ErrorType(str(chunk.get("error_type")))
    except ValueError:
        error_type = ErrorType.INTERNAL
    return ServeError(error_type, str(chunk.get("text") or ""))


def read_refusal(content: bytes) -> ServeError | None:
    """The error that one of our servers has answered with another status than 200; None if it is no such answer."""
    try:
        error = json.loads(content)["error"]
        return ServeError(ErrorType(error["type"]), error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def split_chunks(buffer: bytes) -> tuple[list[dict], bytes]:
    """(complete chunks, what is left) of the bytes received so far."""
    *whole, rest = buffer.split(END_OF_CHUNK)
    return [json.loads(part) for part in whole if part.strip()], rest


def check_address(address: str) -> str:
    """A worker's address in its one normal form, http(s)://host:port; anything else is a LlavaError."""
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 65536:
        raise LlavaError(f"not a worker's address: {address[:80]!a}; expected http://HOST:PORT")
    return f"{found['scheme']}://{found['host']}:{int(found['port'])}".lower()
