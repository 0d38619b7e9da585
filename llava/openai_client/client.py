"""One request to OpenAI, Azure OpenAI or a compatible server: its answer, or its failure as one of three kinds."""

import asyncio
from typing import Any

from llava.errors import require
from llava.openai_client.jobs import ChatJob, ChatResult
from llava.openai_client.settings import ApiSettings
from llava.openai_client.transport import MOST_REPLY, http_client, token_count
from llava.retries import retry_after

_MOST_ASKED = 3600.0
"""Seconds that a server may have us wait before the next try."""


class RefusedByServer(Exception):
    """The server won't have any of our requests."""


class NoAnswer(Exception):
    """An item without an answer; `tokens` (input, output) are paid for all the same."""

    def __init__(self, reason: str, tokens: tuple[int, int] = (0, 0)):
        super().__init__(reason)
        self.tokens = tokens


class UnusableReply(NoAnswer):
    """Worth another try, after `seconds` if the server said so."""

    def __init__(self, reason: str, tokens: tuple[int, int] = (0, 0), seconds: float | None = None):
        super().__init__(reason, tokens)
        self.seconds = seconds


class Unreachable(UnusableReply):
    """The server wasn't reached, or was silent, or broke off."""


class FailedItem(NoAnswer):
    """This item can't be had, trying again won't help."""


def make_client(settings: ApiSettings, most: int = MOST_REPLY):
    """The openai package's asynchronous client, its own retries off (ours are counted and bounded).

    `most`: bytes of a reply.
    """
    openai = require("openai", "openai")
    common = {
        "api_key": settings.api_key,
        "timeout": settings.timeout,
        "max_retries": 0,
        "http_client": http_client(settings.timeout, most),
    }
    if settings.azure_endpoint:
        return openai.AsyncAzureOpenAI(
            azure_endpoint=settings.azure_endpoint, api_version=settings.api_version, **common
        )
    return openai.AsyncOpenAI(base_url=settings.base_url, **common)


async def request(client, job: ChatJob, settings: ApiSettings) -> ChatResult:
    """One HTTP request.

    Raises:
        RefusedByServer, UnusableReply, FailedItem: what went wrong, and whether another try is worth it.
    """
    import openai

    try:
        # The endpoint by its path and the reply as plain JSON: `chat.completions.create` re-validates every field of
        # both in Python, which takes a third of the client's time when hundreds of requests a second pass.
        async with asyncio.timeout(settings.timeout):
            answer = await client.post(
                "/chat/completions", body=job.body(settings.model, settings.reasoning_model), cast_to=object
            )
    except openai.APIStatusError as error:
        return _status_error(error, settings.model)
    except (openai.APITimeoutError, TimeoutError) as error:
        raise Unreachable("timed out") from error
    except (openai.APIConnectionError, openai.APIResponseValidationError) as error:
        raise Unreachable(f"connection failed: {error.__cause__ or error}") from error
    except (ValueError, RecursionError) as error:
        raise UnusableReply(f"the reply is not JSON: {error}") from error
    return read_completion(answer, settings.model)


def read_completion(answer: Any, model: str) -> ChatResult:
    """The result in a chat completion (JSON).

    Raises:
        UnusableReply: a reply of another shape, or without text.
        FailedItem: the tokens were spent before the answer began.
    """
    tokens = _usage(answer)
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal, reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise UnusableReply("the reply holds no answer", tokens) from error
    if reason == "content_filter":
        refusal = refusal or "content filter"
    if text is not None and not isinstance(text, str):
        raise UnusableReply(f"the answer is no text but {type(text).__name__}", tokens)
    if not text and not refusal:
        if reason == "length":
            raise FailedItem(f"the answer is empty: all of its {tokens[1]} tokens were spent before it began", tokens)
        raise UnusableReply("the answer is empty", tokens)
    return ChatResult(
        text=text or "",
        finish_reason=reason,
        model=str(answer.get("model") or model),
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        refused=refusal,
    )


def _usage(answer: Any) -> tuple[int, int]:
    """(input, output) tokens that the server counted; 0 for what it doesn't say, or can't be."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    counted = usage if isinstance(usage, dict) else {}
    return token_count(counted.get("prompt_tokens")), token_count(counted.get("completion_tokens"))


def wants_other_fields(param: Any, code: Any) -> bool:
    """Whether a server's error says that the model is one for `ApiSettings.reasoning_model`."""
    return param in ("max_tokens", "temperature") and str(code).startswith("unsupported_")


def _status_error(error, model: str) -> ChatResult:
    code = getattr(error, "code", None) or ""
    words = f"HTTP {error.status_code}: {getattr(error, 'message', error)}"
    if error.status_code in (401, 403):
        raise RefusedByServer(f"{words}; check the API key and what it may use") from error
    if error.status_code == 404:
        raise RefusedByServer(f"{words}; check --api-base and --api-model") from error
    if code == "insufficient_quota":
        raise RefusedByServer(f"{words}; the account has no money left") from error
    if error.status_code in (408, 409, 429) or error.status_code >= 500:
        raise UnusableReply(words, seconds=retry_after(error.response.headers, _MOST_ASKED)) from error
    if code in ("content_filter", "content_policy_violation"):
        return ChatResult(text="", finish_reason="content_filter", model=model, refused=words)
    if wants_other_fields(getattr(error, "param", None), code):
        raise RefusedByServer(f"{words}; give --reasoning-model") from error
    raise FailedItem(words) from error
