"""A chat request, what came back for it, and how a run of many ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.commandline import write_line
from llava.errors import amount
from llava.openai_client.limits import Account, estimate_tokens
from llava.openai_client.settings import ApiSettings

ASSUMED_ANSWER_TOKENS = 800  # for estimates, where a request has no max_tokens


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

    def body(self, model: str, reasoning: bool = False) -> dict:
        """The request. A reasoning model draws as it will, and counts what it thinks as part of its answer."""
        limit = "max_completion_tokens" if reasoning else "max_tokens"
        optional = {
            "temperature": None if reasoning else self.temperature,
            limit: self.max_tokens,
            "seed": self.seed,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        return {"model": model, "messages": self.messages, **given, **self.more}

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
    """What the settings' runs so far have used together."""
    done: int = 0
    refused: int = 0
    retries: int = 0
    failed: dict[Any, str] = field(default_factory=dict)
    over_budget: int = 0
    first_kept: int = 0
    """Results that a second request was to better, and didn't, or, in a batch, wasn't sent."""

    @property
    def complete(self) -> bool:
        return not self.failed and not self.over_budget

    def __str__(self) -> str:
        spent = self.account.spent
        money = "prices unknown" if spent is None else f"{spent:.4f} USD"
        text = (
            f"{amount(self.total, 'item')}: {self.resumed} from an earlier run, {self.done} new "
            f"({self.refused} refused), {len(self.failed)} failed, {amount(self.account.requests, 'request')} "
            f"({amount(self.retries, 'retry', 'retries')}), "
            f"{self.account.prompt_tokens} + {self.account.completion_tokens} tokens, {money}"
        )
        if self.first_kept:
            text += f"; {self.first_kept} first replies kept as they are: asking again failed, or isn't done in a batch"
        if self.over_budget:
            text += f"; stopped at the cost limit with {amount(self.over_budget, 'item')} left"
        if self.failed:
            key, reason = next(iter(self.failed.items()))
            text += f"; first failure {key!r}: {reason}"
        return text


def print_dry_run(jobs: Sequence[ChatJob], settings: ApiSettings) -> None:
    write_line(describe_dry_run(jobs, settings))


def describe_dry_run(jobs: Sequence[ChatJob], settings: ApiSettings) -> str:
    """The first prompt and what the whole run would cost, by estimate."""
    tokens_in = sum(job.tokens[0] for job in jobs)
    tokens_out = sum(job.tokens[1] for job in jobs)
    cost = settings.account.cost(tokens_in, tokens_out)
    money = "prices unknown: give --price-in and --price-out" if cost is None else f"about {cost:.2f} USD at most"
    lines = [f"--- {message['role']}\n{_shown(message['content'])}" for message in (jobs[0].messages if jobs else [])]
    lines.append(
        f"--- {amount(len(jobs), 'request')} to {settings.model}, about {tokens_in} input tokens and at most "
        f"{tokens_out} output tokens: {money}"
    )
    return "\n".join(lines)


def _shown(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] if part["type"] == "text" else "[image]" for part in content)
