"""How fast servers say that they are well, seen from a process of its own, which has nothing else to do.

`python -m tests.serve.health NAME=URL …` asks each of them every 0.1 s, each time over a new connection, and prints a
JSON line per answer; `HealthWatch` is that process for as long as a block lasts.
"""

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

LOOK_SECONDS = 0.1
PATIENCE = 60.0


@dataclass(frozen=True)
class Look:
    """One question for /health: when it was asked and answered (`time.monotonic`), with which status (0: none)."""

    server: str
    asked: float
    answered: float
    status: int


class HealthWatch:
    """`looks` holds what was seen, once the block has ended.

    Args:
        urls: of the servers, by name.
    """

    def __init__(self, urls: dict[str, str]):
        self.words = [f"{name}={url}" for name, url in urls.items()]
        self.looks: list[Look] = []

    def __enter__(self) -> "HealthWatch":
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, "-m", __name__, *self.words], stdout=self.output)
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()
        with self.output:
            self.output.seek(0)
            whole = [line for line in self.output if line.endswith("}\n")]
        self.looks = [Look(**json.loads(line)) for line in whole]


def latencies(looks: Iterable[Look]) -> dict[str, dict[str, float]]:
    """By server: how many looks, and p50, p99 and max of the milliseconds that its answers took."""
    by_server: dict[str, list[float]] = {}
    for look in looks:
        by_server.setdefault(look.server, []).append(1000 * (look.answered - look.asked))
    found = {}
    for server, times in by_server.items():
        cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
        figures = {"p50": cuts[49], "p99": cuts[98], "max": max(times)}
        found[server] = {"looks": len(times)} | {name: round(value, 1) for name, value in figures.items()}
    return found


async def watch(server: str, url: str) -> None:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), timeout=timeout) as session:
        while True:
            asked, status = time.monotonic(), 0
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url + "/health") as reply:
                    status = reply.status
            print(json.dumps(asdict(Look(server, asked, time.monotonic(), status))), flush=True)
            await asyncio.sleep(LOOK_SECONDS)


async def watch_all(words: list[str]) -> None:
    await asyncio.gather(*(watch(*word.split("=", 1)) for word in words))


if __name__ == "__main__":
    asyncio.run(watch_all(sys.argv[1:]))
