"""What keeps a long run of paid requests within bounds: rate limits, back-off and the account of money."""

import asyncio
import random
from collections import deque
from dataclasses import dataclass, field

from llava.errors import LlavaError

# US dollars per million tokens (input, output), the providers' list prices; --price-in/--price-out override.
LIST_PRICES = {
    "gpt-4": (30.0, 60.0),
    "gpt-4-turbo": (10.0, 30.0),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
}

CHARACTERS_PER_TOKEN = 3.5  # English prose and JSON, on the safe side of the usual 4
TOKENS_PER_IMAGE = 800


def estimate_tokens(messages: list[dict]) -> int:
    """Input tokens of a chat request, from its length; images count a flat amount each."""
    total = 0
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            is_text = part["type"] == "text"
            total += int(len(part["text"]) / CHARACTERS_PER_TOKEN) + 4 if is_text else TOKENS_PER_IMAGE
    return total


def backoff_seconds(attempt: int, base: float, cap: float = 60.0) -> float:
    """Exponential back-off with full jitter, so that clients that failed together don't return together."""
    return random.uniform(0, min(cap, base * 2**attempt))


class RateGate:
    """Lets requests pass at no more than so many, and so many tokens, in any 60 seconds.

    `pause` holds everybody back: a Retry-After is the server's word about all of our requests.
    """

    WINDOW = 60.0

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None):
        self.requests_per_minute = requests_per_minute
        self.tokens_per_minute = tokens_per_minute
        self._passed: deque[tuple[float, int]] = deque()
        self._tokens = 0
        self._open_at = 0.0

    async def acquire(self, tokens: int) -> None:
        clock = asyncio.get_running_loop().time
        while (wait := self._wait(clock(), tokens)) > 0:
            await asyncio.sleep(wait)
        if self.requests_per_minute or self.tokens_per_minute:
            self._passed.append((clock(), tokens))
            self._tokens += tokens

    def pause(self, seconds: float) -> None:
        self._open_at = max(self._open_at, asyncio.get_running_loop().time() + seconds)

    def _wait(self, now: float, tokens: int) -> float:
        while self._passed and self._passed[0][0] <= now - self.WINDOW:
            self._tokens -= self._passed.popleft()[1]
        wait = self._open_at - now
        until_next_leaves = self._passed[0][0] + self.WINDOW - now if self._passed else 0.0
        if self.requests_per_minute and len(self._passed) >= max(1, int(self.requests_per_minute)):
            wait = max(wait, until_next_leaves)
        # A single request above the limit passes alone: the server is the judge of it.
        if self.tokens_per_minute and self._passed and self._tokens + tokens > self.tokens_per_minute:
            wait = max(wait, until_next_leaves)
        return wait


@dataclass
class Account:
    """Tokens and money: what was spent, what is in flight, and the limit."""

    price_in: float | None = None  # US dollars per million tokens
    price_out: float | None = None
    limit: float | None = None  # US dollars
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    _reserved: float = field(default=0.0, repr=False)

    def __post_init__(self):
        if self.limit is not None and (self.price_in is None or self.price_out is None):
            raise LlavaError(
                "a cost limit needs prices and this model's are not known: "
                "give --price-in and --price-out (US dollars per million tokens)"
            )

    @property
    def spent(self) -> float | None:
        """US dollars so far, None where the prices aren't known."""
        return self.cost(self.prompt_tokens, self.completion_tokens)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Set money aside for a request; None if that would break the limit."""
        amount = self.cost(prompt_tokens, completion_tokens) or 0.0
        if self.limit is not None and (self.spent or 0.0) + self._reserved + amount > self.limit:
            return None
        self._reserved += amount
        return amount

    def release(self, amount: float) -> None:
        self._reserved -= amount

    def book(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
