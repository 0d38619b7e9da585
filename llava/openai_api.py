"""The one client of OpenAI, Azure OpenAI and every compatible server, for work of hours against a paid API.

`run_jobs` sends many chat requests with bounded concurrency, retries what can be retried, keeps to rate limits and
a cost limit, and puts every finished item on disk at once, so that a killed run asks again only for what was in
flight. Settings come from environment variables or flags (`add_api_flags`), never from this file.
"""

import asyncio
import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.commandline import write_line
from llava.errors import LlavaError, require
from llava.openai_client.limits import LIST_PRICES, Account, RateGate, backoff_seconds, estimate_tokens
from llava.records import Record, ResumableJsonl

logger = logging.getLogger(__name__)

ASSUMED_ANSWER_TOKENS = 800  # for estimates, where a request has no max_tokens


@dataclass(frozen=True)
class ApiSettings:
    """Where and how to ask. Build it with `settings_from_args` (flags over environment)."""

    model: str
    api_key: str = field(repr=False)
    base_url: str | None = None
    azure_endpoint: str | None = None
    api_version: str | None = None
    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0  # seconds for one request
    max_retries: int = 8
    backoff: float = 0.5  # seconds; doubles with every attempt, with jitter
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    batch_api: bool = False
    poll_seconds: float = 30.0

    def account(self) -> Account:
        """An empty account at this model's prices (half of them through the Batch API)."""
        listed = LIST_PRICES.get(self.model, (None, None))
        prices = [
            given if given is not None else known
            for given, known in zip((self.price_in, self.price_out), listed, strict=True)
        ]
        if self.batch_api:
            prices = [price / 2 if price is not None else None for price in prices]
        return Account(prices[0], prices[1], self.max_cost)


@dataclass(frozen=True)
class ChatJob:
    """One request: `key` names it in the output, `messages` are OpenAI chat messages."""

    key: Any
    messages: list[dict]
    temperature: float = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request."""

    def body(self, model: str) -> dict:
        optional = {"max_tokens": self.max_tokens, "seed": self.seed}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"model": model, "messages": self.messages, "temperature": self.temperature, **given, **self.more}

    @property
    def tokens(self) -> tuple[int, int]:
        """Estimated (input, output) tokens."""
        return estimate_tokens(self.messages), self.max_tokens or ASSUMED_ANSWER_TOKENS


@dataclass(frozen=True)
class ChatResult:
    """What came back; `refused` holds the server's reason where it declined the content."""

    text: str
    finish_reason: str | None
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: str | None = None


@dataclass
class RunSummary:
    """How a run ended: counts, reasons of failed items (they are asked again next time) and the account."""

    total: int
    resumed: int
    account: Account
    done: int = 0
    refused: int = 0
    retries: int = 0
    failed: dict[Any, str] = field(default_factory=dict)
    over_budget: int = 0

    @property
    def complete(self) -> bool:
        return not self.failed and not self.over_budget

    def __str__(self) -> str:
        spent = self.account.spent
        money = "prices unknown" if spent is None else f"{spent:.4f} USD"
        text = (
            f"{self.total} items: {self.resumed} from an earlier run, {self.done} new ({self.refused} refused), "
            f"{len(self.failed)} failed, {self.account.requests} requests ({self.retries} retries), "
            f"{self.account.prompt_tokens} + {self.account.completion_tokens} tokens, {money}"
        )
        if self.over_budget:
            text += f"; stopped at the cost limit with {self.over_budget} items left"
        if self.failed:
            key, reason = next(iter(self.failed.items()))
            text += f"; first failure {key!r}: {reason}"
        return text


def add_api_flags(parser: ArgumentParser) -> None:
    """The flags of everything that asks a language model; each falls back on the environment."""
    group = parser.add_argument_group("language model API")
    group.add_argument("--api-model", help="model, or deployment of Azure [AZURE_OPENAI_DEPLOYMENT]")
    group.add_argument("--api-base", help="address of a compatible server [OPENAI_BASE_URL]")
    group.add_argument("--api-key", help="better given as OPENAI_API_KEY or AZURE_OPENAI_API_KEY")
    group.add_argument("--azure-endpoint", help="[AZURE_OPENAI_ENDPOINT]")
    group.add_argument("--api-version", help="of Azure [OPENAI_API_VERSION]")
    group.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    group.add_argument("--requests-per-minute", type=float)
    group.add_argument("--tokens-per-minute", type=float)
    group.add_argument("--request-timeout", type=float, default=120.0, help="seconds")
    group.add_argument("--max-retries", type=int, default=8, help="of one item, before it counts as failed")
    group.add_argument("--price-in", type=float, help="US dollars per million input tokens")
    group.add_argument("--price-out", type=float, help="US dollars per million output tokens")
    group.add_argument("--max-cost", type=float, help="US dollars; nothing is sent that could exceed it")
    group.add_argument("--batch-api", action="store_true", help="the Batch API: half the price, up to a day")
    group.add_argument("--dry-run", action="store_true", help="print the first prompt and the estimated cost")


def settings_from_args(
    args: Namespace, env: Mapping[str, str] = os.environ, default_model: str | None = None
) -> ApiSettings:
    """Flags over environment variables over defaults; a LlavaError says which setting is missing."""
    azure_endpoint = args.azure_endpoint or env.get("AZURE_OPENAI_ENDPOINT")
    base_url = args.api_base or (None if azure_endpoint else env.get("OPENAI_BASE_URL"))
    if args.api_base and not args.azure_endpoint:
        azure_endpoint = None
    key_name = "AZURE_OPENAI_API_KEY" if azure_endpoint else "OPENAI_API_KEY"
    api_key = args.api_key or env.get(key_name) or ("none" if base_url or args.dry_run else None)
    if not api_key:
        raise LlavaError(f"no API key: set the environment variable {key_name} (or --api-base for a local server)")
    version = args.api_version or env.get("OPENAI_API_VERSION")
    if azure_endpoint and not version:
        raise LlavaError("Azure OpenAI needs an API version: set OPENAI_API_VERSION or --api-version")
    model = args.api_model or (env.get("AZURE_OPENAI_DEPLOYMENT") if azure_endpoint else None) or default_model
    if not model:
        raise LlavaError("no model named: give --api-model (for Azure, or AZURE_OPENAI_DEPLOYMENT)")
    if args.concurrency < 1:
        raise LlavaError(f"--concurrency must be at least 1, got {args.concurrency}")
    return ApiSettings(
        model=model,
        api_key=api_key,
        base_url=base_url,
        azure_endpoint=azure_endpoint,
        api_version=version,
        concurrency=args.concurrency,
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        timeout=args.request_timeout,
        max_retries=args.max_retries,
        price_in=args.price_in,
        price_out=args.price_out,
        max_cost=args.max_cost,
        batch_api=args.batch_api,
    )


def describe_dry_run(jobs: Sequence[ChatJob], settings: ApiSettings) -> str:
    """The first prompt and what the whole run would cost, by estimate."""
    tokens_in = sum(job.tokens[0] for job in jobs)
    tokens_out = sum(job.tokens[1] for job in jobs)
    cost = settings.account().cost(tokens_in, tokens_out)
    money = "prices unknown: give --price-in and --price-out" if cost is None else f"about {cost:.2f} USD at most"
    lines = [f"--- {message['role']}\n{_shown(message['content'])}" for message in (jobs[0].messages if jobs else [])]
    lines.append(
        f"--- {len(jobs)} requests to {settings.model}, about {tokens_in} input tokens and at most "
        f"{tokens_out} output tokens: {money}"
    )
    return "\n".join(lines)


def run_jobs(
    jobs: Sequence[ChatJob],
    settings: ApiSettings,
    output: ResumableJsonl,
    to_record: Callable[[ChatJob, ChatResult], Record],
    *,
    follow_up: Callable[[ChatJob, ChatResult], ChatJob | None] | None = None,
    progress: str | None = None,
) -> RunSummary:
    """Ask for every job that `output` doesn't hold yet; each result is on disk as soon as it is there.

    Args:
        to_record: the line to write; it must carry the job's key under `output.key`.
        follow_up: a second request for a result that isn't good enough (asked once), or None.
        progress: title of a progress bar.

    Returns:
        the summary. Items that failed after all retries are not in `output`: the next run asks for them again.

    Raises:
        LlavaError: the server refuses us altogether (wrong key, unknown model, no quota left).
    """
    todo = [job for job in jobs if job.key not in output.done]
    summary = RunSummary(total=len(jobs), resumed=len(jobs) - len(todo), account=settings.account())
    if todo and settings.batch_api:
        from llava.openai_client.batch import run_batch

        run_batch(todo, settings, output, to_record, summary)
    elif todo:
        asyncio.run(_run_concurrently(todo, settings, output, to_record, follow_up, progress, summary))
    return summary


def print_dry_run(jobs: Sequence[ChatJob], settings: ApiSettings) -> None:
    write_line(describe_dry_run(jobs, settings))


def make_client(settings: ApiSettings):
    """The openai package's asynchronous client, its own retries off (ours are counted and bounded)."""
    openai = require("openai", "openai")
    common = {"api_key": settings.api_key, "timeout": settings.timeout, "max_retries": 0}
    if settings.azure_endpoint:
        return openai.AsyncAzureOpenAI(
            azure_endpoint=settings.azure_endpoint, api_version=settings.api_version, **common
        )
    return openai.AsyncOpenAI(base_url=settings.base_url, **common)


class _Fatal(Exception):
    """The server won't have any of our requests."""


class UnusableReply(Exception):
    """Worth another try, after `seconds` if the server said so."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


class _Failed(Exception):
    """This item can't be had, trying again won't help."""


async def _run_concurrently(todo, settings, output, to_record, follow_up, progress, summary) -> None:
    from tqdm import tqdm

    gate = RateGate(settings.requests_per_minute, settings.tokens_per_minute)
    queue: Iterator[ChatJob] = iter(todo)
    bar = tqdm(total=summary.total, initial=summary.resumed, desc=progress, unit="item", disable=progress is None)

    async def worker(client) -> None:
        for job in queue:
            try:
                result = await _ask(client, job, settings, gate, summary)
                if result is None:
                    summary.over_budget += 1 + sum(1 for _ in queue)
                    return
                better = follow_up(job, result) if follow_up else None
                if better is not None:
                    result = await _ask(client, better, settings, gate, summary) or result
            except _Failed as error:
                summary.failed[job.key] = str(error)
            else:
                output.add(to_record(job, result))
                summary.done += 1
                summary.refused += result.refused is not None
            bar.update()
            if summary.account.spent is not None:
                bar.set_postfix_str(f"{summary.account.spent:.3f} USD", refresh=False)

    async with make_client(settings) as client:
        workers = [asyncio.create_task(worker(client)) for _ in range(min(settings.concurrency, len(todo)))]
        try:
            await asyncio.gather(*workers)
        except _Fatal as error:
            raise LlavaError(f"{settings.base_url or settings.azure_endpoint or 'OpenAI'}: {error}") from error
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            bar.close()


async def _ask(client, job: ChatJob, settings: ApiSettings, gate: RateGate, summary: RunSummary) -> ChatResult | None:
    """One job with its retries; None when the cost limit forbids it."""
    account = summary.account
    for attempt in range(settings.max_retries + 1):
        reserved = account.reserve(*job.tokens)
        if reserved is None:
            return None
        try:
            await gate.acquire(sum(job.tokens))
            account.requests += 1
            result = await _request(client, job, settings.model)
            account.book(result.prompt_tokens, result.completion_tokens)
            return result
        except UnusableReply as error:
            if attempt == settings.max_retries:
                raise _Failed(f"{error} (given up after {attempt + 1} tries)") from error
            summary.retries += 1
            if error.seconds is not None:
                gate.pause(error.seconds)
            else:
                await asyncio.sleep(backoff_seconds(attempt, settings.backoff))
        finally:
            account.release(reserved)
    raise AssertionError("unreachable")


async def _request(client, job: ChatJob, model: str) -> ChatResult:
    """One HTTP request; its failure as one of the three kinds above."""
    import openai

    try:
        # The endpoint by its path and the reply as plain JSON: `chat.completions.create` re-validates every field of
        # both in Python, which takes a third of the client's time when hundreds of requests a second pass.
        answer = await client.post("/chat/completions", body=job.body(model), cast_to=object)
    except openai.APIStatusError as error:
        return _status_error(error, model)
    except openai.APITimeoutError as error:
        raise UnusableReply("timed out") from error
    except (openai.APIConnectionError, openai.APIResponseValidationError) as error:
        raise UnusableReply(f"connection failed: {error.__cause__ or error}") from error
    except ValueError as error:
        raise UnusableReply(f"the reply is not JSON: {error}") from error
    return read_completion(answer, model)


def read_completion(answer: Any, model: str) -> ChatResult:
    """The result in a chat completion (JSON); a reply of another shape is worth another try."""
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal, reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        usage = answer.get("usage") or {}
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise UnusableReply("the reply holds no answer") from error
    if reason == "content_filter":
        refusal = refusal or "content filter"
    if not text and not refusal:
        raise UnusableReply("the answer is empty")
    return ChatResult(
        text=text or "",
        finish_reason=reason,
        model=answer.get("model") or model,
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        refused=refusal,
    )


def _status_error(error, model: str) -> ChatResult:
    code = getattr(error, "code", None) or ""
    words = f"HTTP {error.status_code}: {getattr(error, 'message', error)}"
    if error.status_code in (401, 403):
        raise _Fatal(f"{words}; check the API key and what it may use") from error
    if error.status_code == 404:
        raise _Fatal(f"{words}; check --api-base and --api-model") from error
    if code == "insufficient_quota":
        raise _Fatal(f"{words}; the account has no money left") from error
    if error.status_code in (408, 409, 429) or error.status_code >= 500:
        raise UnusableReply(words, _retry_after(error.response.headers)) from error
    if code in ("content_filter", "content_policy_violation"):
        return ChatResult(text="", finish_reason="content_filter", model=model, refused=words)
    raise _Failed(words) from error


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait (Retry-After in seconds, or retry-after-ms)."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    return None


def _shown(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] if part["type"] == "text" else "[image]" for part in content)
