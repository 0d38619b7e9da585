"""What keeps a long run of paid requests within bounds: rate limits and the account of money."""

import asyncio
from dataclasses import dataclass, field

from aiolimiter import AsyncLimiter

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


class RateGate:
    """Limits requests and tokens per minute.

    Passing is spread over the minute: at most what is allowed for `BURST_SECONDS` passes at once, because providers
    count in such short windows. `pause` holds everybody back: a Retry-After is the server's word about all of our
    requests.
    """

    BURST_SECONDS = 10.0

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None):
        self._requests = _limiter(requests_per_minute)
        self._tokens = _limiter(tokens_per_minute)
        self._most_tokens = tokens_per_minute or 0.0
        self._open_at = 0.0
        self._turn = asyncio.Lock()

    async def acquire(self, tokens: int) -> None:
        """Wait until a request of `tokens` tokens (its answer's included) may be sent."""
        clock = asyncio.get_running_loop().time
        # One after the other: aiolimiter lets small amounts pass first, and a large one might wait for ever.
        async with self._turn:
            if self._requests is not None:
                await self._requests.acquire()
            if self._tokens is not None:
                # A single request above the limit takes the whole minute: the server is the judge of it.
                left = min(float(tokens), self._most_tokens)
                while left > 0:
                    piece = min(left, self._tokens.max_rate)
                    await self._tokens.acquire(piece)
                    left -= piece
            while (wait := self._open_at - clock()) > 0:
                await asyncio.sleep(wait)

    def pause(self, seconds: float) -> None:
        self._open_at = max(self._open_at, asyncio.get_running_loop().time() + seconds)


def _limiter(per_minute: float | None) -> AsyncLimiter | None:
    if not per_minute:
        return None
    burst = max(1.0, per_minute * RateGate.BURST_SECONDS / 60)
    return AsyncLimiter(burst, 60 * burst / per_minute)


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
