"""What goes wrong during the soak: a fault every so many seconds, drawn by a seed, each kind as often as the others."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp

from tests.faults.soak.requests import CHAT, HEADERS, Client, question
from tests.faults.soak.stack import SERVERS, Stack
from tests.security.crowds import babble, drip, leave
from tests.security.wire import credential_lines, head

CROWD = 60
BACK_SECONDS = 150.0
LONGEST_STOP = 8.0
FULL_SECONDS = 5.0
RESTARTED_UNTIL = 0.5  # of the time: afterwards the controller lives on, so that it can be seen growing
KILLED_WORKER = "worker-1"  # the other one lives through
PIECE = 1 << 20


@dataclass(frozen=True)
class Outage:
    """When one of the servers couldn't answer, by a fault's doing (`time.monotonic`)."""

    server: str
    began: float
    ended: float


class Faults:
    """`done` counts them by kind, `wrong` what came of them that shouldn't have."""

    def __init__(self, stack: Stack, client: Client, seed: int):
        self.stack, self.client = stack, client
        self.dice = random.Random(f"faults {seed}")
        self.done: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.outages: list[Outage] = []
        self.kills: list[float] = []
        """Of workers; who was asking then may have lost his answer."""
        self.kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "worker killed": self.kill_worker,
            "worker stopped": self.stop_worker,
            "controller killed": self.kill_controller,
            "slow heads": self.slow_heads,
            "slow bodies": self.slow_bodies,
            "garbage": self.garbage,
            "bulk leaves": self.bulk_leaves,
        }
        if stack.has_own_memory:
            self.kinds["uploads full"] = self.fill_uploads

    async def run(self, every: float, seconds: float) -> None:
        """A fault every `every` seconds, for so many seconds; returns once the last is over."""
        until, restarts_until = time.monotonic() + seconds, time.monotonic() + RESTARTED_UNTIL * seconds
        running: list[asyncio.Task] = []
        bag: list[str] = []
        while time.monotonic() + every < until:
            await asyncio.sleep(every)
            bag = bag or self.dice.sample(sorted(self.kinds), len(self.kinds))
            name = bag.pop()
            if name == "controller killed" and time.monotonic() > restarts_until:
                name = "garbage"
            self.done[name] += 1
            running.append(asyncio.create_task(self._do(name)))
        await asyncio.gather(*running)

    async def _do(self, name: str) -> None:
        try:
            await self.kinds[name]()
        except (OSError, aiohttp.ClientError, TimeoutError, AssertionError) as error:
            self.wrong[f"{name}: {type(error).__name__}: {str(error)[:80]}"] += 1

    async def kill_worker(self) -> None:
        self.kills.append(time.monotonic())
        await self._kill(KILLED_WORKER)

    async def kill_controller(self) -> None:
        await self._kill("controller")

    async def _kill(self, name: str) -> None:
        """It is started again by `llava.serve`."""
        began = time.monotonic()
        process = self.stack.process(name)
        if process is None:
            self.wrong[f"{name} wasn't back for the next kill"] += 1
            return
        process.kill()
        is_back = await self._is_well(name, process.pid)
        self.outages.append(Outage(name, began, time.monotonic()))
        if not is_back:
            self.wrong[f"{name} didn't come back within {BACK_SECONDS:g} s"] += 1

    async def _is_well(self, name: str, not_pid: int) -> bool:
        deadline = time.monotonic() + BACK_SECONDS
        while time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            process = self.stack.process(name)
            if process is None or process.pid == not_pid:
                continue
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with self.client.session.get(self.stack.url(name) + "/health") as reply:
                    if reply.status == 200:
                        return True
        return False

    async def stop_worker(self) -> None:
        name = self.dice.choice(("worker-0", "worker-1"))
        process = self.stack.process(name)
        if process is None:
            return
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(self.dice.uniform(2.0, LONGEST_STOP))
            finally:
                os.kill(process.pid, signal.SIGCONT)
        self.outages.append(Outage(name, began, time.monotonic() + 1.0))

    async def slow_heads(self) -> None:
        await self._expect("slow heads", "request_timeout", lambda port: drip(port, b"GET /", b"x"))

    async def slow_bodies(self) -> None:
        begin = head("Content-Length: 5000", *credential_lines(HEADERS), method="POST", path=CHAT)
        port = self.stack.ports["api"]
        await self._expect("slow bodies", "request_timeout", lambda _: drip(port, begin, b" "))

    async def _expect(self, name: str, error: str, ask: Callable[[int], Awaitable[str | None]]) -> None:
        ports = [self.stack.ports[server] for server in ("api", "page")]
        said = await asyncio.gather(*(ask(ports[number % len(ports)]) for number in range(CROWD)))
        for each in set(said) - {error}:
            self.wrong[f"{name}: {each} in place of {error}"] += said.count(each)

    async def garbage(self) -> None:
        ports = [self.stack.ports[server] for server in SERVERS]
        work = (babble(self.dice.choice(ports), self.dice, 15.0) for _ in range(CROWD))
        # A worker or the controller may just be starting.
        for each in await asyncio.gather(*work, return_exceptions=True):
            if each is None:
                self.wrong["garbage: an answer without a type"] += 1

    async def bulk_leaves(self) -> None:
        bodies = [question(self.dice, stream=True) | {"max_tokens": 300} for _ in range(CROWD)]
        # Where the queue is full, some are refused.
        statuses = await asyncio.gather(*(leave(self.client.session, CHAT, json=body) for body in bodies))
        for status in set(statuses) - {200, 429}:
            self.wrong[f"bulk leaves: status {status}"] += statuses.count(status)

    async def fill_uploads(self) -> None:
        """The page's uploads find no space; what was there stays whole."""
        path = self.stack.uploads() / "filler"
        try:
            with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
                while file.write(bytes(PIECE)):
                    pass
            await asyncio.sleep(FULL_SECONDS)
        finally:
            path.unlink(missing_ok=True)
