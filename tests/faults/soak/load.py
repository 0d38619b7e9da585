"""The soak's load: a mixture of requests, as fast as a fixed number of clients goes, or at random times at a rate."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass

from tests.faults.soak import page
from tests.faults.soak.requests import (
    Again,
    Client,
    Kind,
    Lost,
    leaving,
    refused,
    several_choices,
    text,
    text_streamed,
    well,
    with_image,
    with_images_streamed,
    with_large_body,
)

KINDS = (
    Kind("text", 24, text),
    Kind("text, streamed", 24, text_streamed),
    Kind("with an image", 14, with_image),
    Kind("with images, streamed", 12, with_images_streamed),
    Kind("three choices", 3, several_choices),
    Kind("page conversation", 2, page.conversation),
    Kind("large body", 0.3, with_large_body),
    Kind("leaving", 8, leaving),
    Kind("to be refused", 12.7, refused, is_refused=True),
)
TRIES = 8
MOST_IN_FLIGHT = 256


@dataclass(frozen=True)
class Request:
    """One that is over: `lost` says what came in place of the right answer; `again` how often it was sent anew."""

    kind: str
    is_refused: bool
    asked: float
    ended: float
    lost: str | None
    again: int


class Load:
    """`over` are the requests that have ended; the same seed asks the same."""

    def __init__(self, client: Client, seed: int):
        self.client, self.seed = client, seed
        self.over: list[Request] = []
        self.failing: Counter[str] = Counter()
        self.in_flight = self.started = 0
        self.held_back = 0.0
        """Seconds for which no request was sent, since `MOST_IN_FLIGHT` were waiting."""

    async def each_kind(self, times: int) -> None:
        for kind in KINDS * times:
            await self._ask(kind)

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Requests per second that so many clients get through, each asking again once it has its answer."""
        began, before = time.monotonic(), len(self.over)

        async def client() -> None:
            while time.monotonic() < began + seconds:
                await self._ask()

        await asyncio.gather(*(client() for _ in range(clients)))
        return (len(self.over) - before) / (time.monotonic() - began)

    async def fill(self, wanted: dict[str, int], clients: int, seconds: float) -> dict[str, int]:
        """Ask requests of these kinds, by name, until so many of each have ended, `seconds` at most; how many have."""
        kinds = {kind.name: kind for kind in KINDS}
        left = Counter(wanted)
        until = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < until and (names := [name for name in left if left[name] > 0]):
                name = max(names, key=lambda one: left[one] / wanted[one])
                left[name] -= 1
                await self._ask(kinds[name])

        await asyncio.gather(*(client() for _ in range(clients)))
        return {name: count - left[name] for name, count in wanted.items()}

    async def poisson(self, rate: float, seconds: float) -> None:
        """`rate` per second on average, whoever is still waiting; returns once all have ended."""
        dice = random.Random(f"times {self.seed}")
        began, due = time.monotonic(), 0.0
        async with asyncio.TaskGroup() as tasks:
            while (due := due + dice.expovariate(rate)) < seconds:
                await asyncio.sleep(max(0.0, began + due - time.monotonic()))
                before = time.monotonic()
                while self.in_flight >= MOST_IN_FLIGHT:
                    await asyncio.sleep(0.01)
                waited = time.monotonic() - before
                self.held_back += waited
                began += waited
                seconds -= waited
                tasks.create_task(self._ask())

    async def _ask(self, kind: Kind | None = None) -> None:
        self.started += 1
        number = self.started
        kind = kind or random.Random(f"{self.seed} {number}").choices(KINDS, [each.weight for each in KINDS])[0]
        asked, again, lost = time.monotonic(), 0, None
        self.in_flight += 1
        try:
            for left in range(TRIES)[::-1]:
                try:
                    await well(kind.ask(self.client, random.Random(f"{self.seed} {number}")))
                    break
                except Again as error:
                    again += 1
                    lost = f"{error.kind}, {TRIES} times" if not left else None
                    await asyncio.sleep(error.seconds)
        except Lost as error:
            lost = error.kind
        finally:
            self.in_flight -= 1
        if lost:
            self.failing[lost] += 1
        self.over.append(Request(kind.name, kind.is_refused, asked, time.monotonic(), lost, again))
