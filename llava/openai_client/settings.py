"""Where and how to ask a language model: flags over environment variables, never this file."""

import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from llava.errors import LlavaError
from llava.openai_client.limits import LIST_PRICES, Account

_LEAST = {
    "concurrency": 1,
    "requests_per_minute": 0,
    "tokens_per_minute": 0,
    "request_timeout": 0.001,
    "max_retries": 0,
    "price_in": 0,
    "price_out": 0,
    "max_cost": 0,
}
PUBLISHED_MODEL, PUBLISHED_DEPLOYMENT = "gpt-4-0314", "deployment-name"
"""What LLaVA-Med's own files ask, of OpenAI and of Azure."""

logger = logging.getLogger(__name__)


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
    reasoning_model: bool = False  # takes max_completion_tokens in place of max_tokens, and no temperature
    poll_seconds: float = 30.0

    @property
    def where(self) -> str:
        """Who is asked, for messages."""
        return self.base_url or self.azure_endpoint or "OpenAI"

    @cached_property
    def account(self) -> Account:
        """The account of all that is asked with these settings, at this model's prices (half of them through the Batch
        API): `max_cost` holds for a whole command, however often it calls `run_jobs`."""
        listed = LIST_PRICES.get(self.model, (None, None))
        prices = [
            given if given is not None else known
            for given, known in zip((self.price_in, self.price_out), listed, strict=True)
        ]
        if self.batch_api:
            prices = [price / 2 if price is not None else None for price in prices]
        return Account(prices[0], prices[1], self.max_cost)


def add_api_flags(parser: ArgumentParser) -> None:
    """The flags of everything that asks a language model; each falls back on the environment."""
    group = parser.add_argument_group("language model API", "a model on a server, asked by OpenAI's protocol")
    group.add_argument("--api-model", help="model, or deployment of Azure [AZURE_OPENAI_DEPLOYMENT]")
    group.add_argument("--api-base", help="address of a compatible server [OPENAI_BASE_URL]")
    group.add_argument("--api-key", help="better given as OPENAI_API_KEY or AZURE_OPENAI_API_KEY")
    group.add_argument("--azure-endpoint", help="[AZURE_OPENAI_ENDPOINT]")
    group.add_argument("--api-version", help="of Azure [OPENAI_API_VERSION]")
    group.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    group.add_argument("--requests-per-minute", type=float, help="at most so many")
    group.add_argument("--tokens-per-minute", type=float, help="at most so many, of requests and answers")
    group.add_argument("--request-timeout", type=float, default=120.0, help="seconds")
    group.add_argument("--max-retries", type=int, default=8, help="of one item, before it counts as failed")
    group.add_argument("--price-in", type=float, help="US dollars per million input tokens")
    group.add_argument("--price-out", type=float, help="US dollars per million output tokens")
    group.add_argument("--max-cost", type=float, help="US dollars; nothing is sent that could exceed it")
    group.add_argument("--batch-api", action="store_true", help="the Batch API: half the price, up to a day; asks once")
    group.add_argument(
        "--reasoning-model", action="store_true", help="send max_completion_tokens for max_tokens, and no temperature"
    )
    group.add_argument("--dry-run", action="store_true", help="print the first prompt and the estimated cost")


def settings_from_args(args: Namespace, env: Mapping[str, str] = os.environ) -> ApiSettings:
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
    model = args.api_model or (env.get("AZURE_OPENAI_DEPLOYMENT") if azure_endpoint else None)
    if not model:
        model = PUBLISHED_DEPLOYMENT if azure_endpoint else PUBLISHED_MODEL
        logger.warning("no model named: asking for %r, as published; --api-model names another", model)
    _check_numbers(args)
    address = base_url or azure_endpoint
    if address and not address.lower().startswith(("http://", "https://")):
        raise LlavaError(f"{address} is no address of a server; it begins with http:// or https://")
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
        reasoning_model=args.reasoning_model,
    )


def _check_numbers(args: Namespace) -> None:
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:  # not a number isn't either
            raise LlavaError(f"--{name.replace('_', '-')} is {value}; give {least} or more")
