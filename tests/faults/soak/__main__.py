"""The whole stack under a mixed load at 80 % of its capacity, with a fault every 30 seconds.

    python -m tests.faults.soak --minutes 60 --json runs/soak.json

`llava.serve` starts controller, two workers with a tiny model, API and page. First their capacity for the mixture is
measured, then the load comes at random times. Figures are JSON; the exit code is 1 if an aim is missed: of all
well-formed requests 99.9 % answered (those in flight on a killed worker are counted apart), every refusal and error of
the right type, no process that lives through grows by 2 %, and none keeps files open.
"""

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from llava.records import write_json
from tests.faults.soak.faults import Faults, Outage
from tests.faults.soak.load import Load, Request, figures_of
from tests.faults.soak.requests import Client
from tests.faults.soak.stack import SERVERS, Sample, Stack
from tests.serve.health import HealthWatch, Look, latencies

CLIENTS = 32
LOAD = 0.8
ANSWERED = 0.999
GROWTH = 0.02
MORE_FILES = 3
SAMPLE_SECONDS = 5.0
QUIET_SECONDS = 60.0  # idle connections between the servers are closed after 25 to 50
JUDGED_SECONDS = 600.0  # of a life: a shorter one is mostly warm-up
EXCEPTED = {"worker_lost"}


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
                    tasks.create_task(self.load.poisson(LOAD * capacity, seconds))
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
            "capacity_per_second": round(capacity, 2),
            "load_per_second": round(len(requests) / took, 2),
            "held_back_seconds": round(self.load.held_back, 1),
            **answers(requests, self.faults.kills),
            "requests": figures_of(requests),
            "faults": dict(sorted(self.faults.done.items())),
            "faults_wrong": dict(self.faults.wrong),
            "memory": memory(self.samples),
            "files": {
                name: {"before": files_before[name], "after": files_after.get(name), "most": most}
                for name, most in _most_files(self.samples).items()
                if name in files_before
            },
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


def answers(requests: list[Request], kills: list[float]) -> dict:
    """How many well-formed requests were answered, without those that a killed worker took with it; and refusals."""
    well_formed = [request for request in requests if not request.is_refused]
    lost = [request for request in well_formed if request.lost]
    excepted = [
        request
        for request in lost
        if request.lost in EXCEPTED and any(request.asked <= kill <= request.ended for kill in kills)
    ]
    counted = len(well_formed) - len(excepted)
    refused = [request for request in requests if request.is_refused]
    return {
        "well_formed": len(well_formed),
        "answered": len(well_formed) - len(lost),
        "in_flight_on_a_killed_worker": len(excepted),
        "answered_share": round((len(well_formed) - len(lost)) / max(1, counted), 6),
        "sent_again": dict(Counter(request.again for request in well_formed if request.again)),
        "refused_as_it_has_to_be": sum(request.lost is None for request in refused),
        "refused_otherwise": dict(Counter(request.lost for request in refused if request.lost)),
    }


def memory(samples: list[Sample]) -> dict[str, dict]:
    """Of each server's longest life: MB when it had warmed up (after a third of it) and at its end, and the growth."""
    lives: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        lives.setdefault((sample.name, sample.pid), []).append(sample)
    longest: dict[str, list[Sample]] = {}
    for (name, _), life in lives.items():
        if len(life) > len(longest.get(name, ())):
            longest[name] = life
    found = {}
    for name, life in sorted(longest.items()):
        part = max(1, len(life) // 12)
        settled, late = life[4 * part : 5 * part] or life, life[-part:]
        sizes = {
            what: [statistics.median(getattr(sample, what) for sample in some) for some in (settled, late)]
            for what in ("rss", "pss")
        }
        seconds = life[-1].when - life[0].when
        found[name] = {
            "seconds": round(seconds),
            "is_judged": seconds >= JUDGED_SECONDS,
            **{f"{what}_mb": [round(size / 1e6, 1) for size in pair] for what, pair in sizes.items()},
            **{f"{what}_growth": round(pair[1] / pair[0] - 1, 4) for what, pair in sizes.items()},
            "rss_mb_over_time": [round(sample.rss / 1e6, 1) for sample in life[:: max(1, len(life) // 24)]],
        }
    return found


def _most_files(samples: list[Sample]) -> dict[str, int]:
    most: dict[str, int] = {}
    for sample in samples:
        most[sample.name] = max(sample.files, most.get(sample.name, 0))
    return most


def in_order(looks: list[Look], outages: list[Outage]) -> list[Look]:
    """The looks at servers that no fault kept from answering."""
    return [look for look in looks if look.status and not _is_out(look, outages)]


def silent(looks: list[Look], outages: list[Outage]) -> dict[str, int]:
    """How often a server gave no answer without a fault that explains it."""
    return dict(Counter(look.server for look in looks if look.status != 200 and not _is_out(look, outages)))


def _is_out(look: Look, outages: list[Outage]) -> bool:
    return any(each.server == look.server and each.began <= look.answered and look.asked <= each.ended for each in outages)


def missed(figures: dict) -> list[str]:
    """The aims that a run has missed."""
    found = []
    if figures["answered_share"] < ANSWERED:
        found.append(f"answered: {figures['answered_share']:.4%} of the well-formed requests, not {ANSWERED:.1%}")
    for what in ("refused_otherwise", "faults_wrong", "health_not_answered", "wrong_in_the_logs"):
        if figures[what]:
            found.append(f"{what}: {figures[what]}")
    for name, each in figures["memory"].items():
        if each["is_judged"] and each["rss_growth"] >= GROWTH:
            found.append(f"memory of {name}: {each['rss_growth']:+.2%}")
    for name, each in figures["files"].items():
        if each["after"] is not None and each["after"] > each["before"] + MORE_FILES:
            found.append(f"open files of {name}: {each['before']} before, {each['after']} after")
    if figures["exit_code"] != 0:
        found.append(f"llava.serve ended with {figures['exit_code']}")
    return found


def wrong_in(log: str) -> list[str]:
    """Tracebacks, by their last line."""
    parts = re.split(r"Traceback \(most recent call last\):", log)[1:]
    return [next((line.strip() for line in part.splitlines() if re.match(r" *[\w.]+(Error|Exception)", line)), part[:200]) for part in parts]


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
    figures["wrong_in_the_logs"] = dict(Counter(wrong_in(log)))
    figures["missed"] = missed(figures)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="of the load")
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
