"""The whole stack under a mixed load at 80 % of its capacity, with a fault every 30 seconds.

    python -m tests.faults.soak --minutes 60 --json runs/soak.json

`llava.serve` starts controller, two workers with a tiny model, API and page. First what they may keep in memory is
filled and their capacity for the mixture is measured, then the load comes at random times. Figures are JSON; the exit
code is 1 if an aim is missed: of all well-formed requests 99.9 % answered (those in flight on a killed worker are
counted apart), every refusal and error of the right type, no process that lives through grows by 2 %, and none keeps
files open.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from llava.records import write_json
from tests.faults.soak.faults import Faults
from tests.faults.soak.figures import answers, by_kind, files, in_order, memory, missed, silent, wrong_in
from tests.faults.soak.load import Load
from tests.faults.soak.requests import Client
from tests.faults.soak.stack import SERVERS, Sample, Stack
from tests.serve.health import HealthWatch, latencies

CLIENTS = 32
SAMPLE_SECONDS = 5.0
QUIET_SECONDS = 60.0  # idle connections between the servers are closed after 25 to 50
FILLING = {"with an image": 700, "with images, streamed": 700, "text": 2000, "page conversation": 520}
"""Requests after which both workers' stores (`CACHE_MB`) and the page's conversations take what they may take."""
FILLING_SHARE = 0.25  # of the load's time at most


class Soak:
    """One run; what is seen of the processes while it lasts."""

    def __init__(self, stack: Stack, client: Client, args: argparse.Namespace):
        self.stack, self.client, self.args = stack, client, args
        self.load = Load(client, args.seed)
        self.faults = Faults(stack, client, args.seed)
        self.samples: list[Sample] = []
        self.phase = "warm-up"
        self.began: float | None = None

    async def run(self) -> dict:
        seconds = 60 * self.args.minutes
        measuring = min(60.0, max(10.0, seconds / 20))
        showing = asyncio.create_task(self._show(seconds))
        try:
            await self.load.each_kind(2)
            self.phase = "filling"
            began = time.monotonic()
            filled = await self.load.fill(FILLING, CLIENTS, FILLING_SHARE * seconds)
            filling = time.monotonic() - began
            self.phase = "capacity"
            await self.load.closed_loop(CLIENTS, measuring / 2)
            capacity = await self.load.closed_loop(CLIENTS, measuring)
            self.phase = "quiet"
            files_before = await self._quiet_files()
            before = len(self.load.over)
            self.phase = "load"
            self.began = began = time.monotonic()
            sampling = asyncio.create_task(self._sample_for_ever())
            with HealthWatch({name: self.stack.url(name) for name in SERVERS}) as health:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self.load.poisson(self.args.load * capacity, seconds))
                    tasks.create_task(self.faults.run(self.args.fault_seconds, seconds))
            took = time.monotonic() - began
            sampling.cancel()
            self.phase = "quiet"
            files_after = await self._quiet_files()
        finally:
            showing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await showing
        requests = self.load.over[before:]
        return {
            "minutes": round(took / 60, 2),
            "seed": self.args.seed,
            "load": self.args.load,
            "capacity_per_second": round(capacity, 2),
            "load_per_second": round(len(requests) / took, 2),
            "held_back_seconds": round(self.load.held_back, 1),
            **answers(requests, self.faults.kills),
            "requests": by_kind(requests),
            "faults": dict(sorted(self.faults.done.items())),
            "faults_wrong": dict(self.faults.wrong),
            "filled_before_the_load": {
                "seconds": round(filling),
                "requests": filled,
                "of": FILLING,
                "is_full": filled == FILLING,
            },
            "memory": memory(self.samples),
            "files": files(self.samples, files_before, files_after),
            "health_ms": latencies(in_order(health.looks, self.faults.outages)),
            "health_not_answered": silent(health.looks, self.faults.outages),
        }

    async def _quiet_files(self) -> dict[str, int]:
        await asyncio.sleep(QUIET_SECONDS)
        return {sample.name: sample.files for sample in await asyncio.to_thread(self.stack.samples)}

    async def _sample_for_ever(self) -> None:
        while True:
            self.samples += await asyncio.to_thread(self.stack.samples)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _show(self, seconds: float) -> None:
        """A bar of the load's time: requests so far, how fast they go, what is failing."""
        shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        with tqdm(total=round(seconds), bar_format=shown, dynamic_ncols=True) as bar:
            pause = 1.0 if sys.stderr.isatty() else 10.0
            before = 0
            while True:
                load = self.load
                rate, before = (len(load.over) - before) / pause, len(load.over)
                failing = ", ".join(f"{kind} {count}" for kind, count in load.failing.most_common(3)) or "none"
                bar.n = min(bar.total, round(time.monotonic() - self.began)) if self.began else 0
                bar.set_description(self.phase, refresh=False)
                words = f"{len(load.over)} requests, {rate:.1f}/s, {load.in_flight} in flight"
                bar.set_postfix_str(f"{words}, {self.faults.done.total()} faults, failing: {failing}")
                await asyncio.sleep(pause)


def soak(args: argparse.Namespace) -> dict:
    async def run(stack: Stack) -> dict:
        client = Client(stack)
        try:
            return await Soak(stack, client, args).run()
        finally:
            await client.close()

    with tempfile.TemporaryDirectory(prefix="llava-soak-") as folder:
        with Stack(Path(folder)) as stack:
            figures = asyncio.run(run(stack))
            figures["exit_code"] = stack.stop()
        log = stack.log.read_text(errors="replace")
        if args.log:
            args.log.write_text(log)
    figures["wrong_in_the_logs"] = wrong_in(log)
    figures["missed"] = missed(figures)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="of the load")
    parser.add_argument("--load", type=float, default=0.8, help="share of the capacity that the requests take")
    parser.add_argument("--fault-seconds", type=float, default=30, help="between two faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--log", type=Path, help="keep here what the servers wrote")
    args = parser.parse_args()
    figures = soak(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, figures)
    print(json.dumps(figures, indent=1))
    return 1 if figures["missed"] else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
