"""Runs a target over mutated files: each in 1.5 GB of memory and 5 seconds of processor time.

A file has to be read, or to be refused by one of the target's errors, in one line of plain words. Whatever else happens
is a finding, with the number that makes the same file again.
"""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MEMORY = 1_500_000_000
SECONDS = 5
PLAIN = re.compile(r"\n|object at 0x|[\x00-\x08\x0e-\x1f]|.{3000}")
"""What no error says."""


@dataclass
class Target:
    """A kind of file and its reader."""

    originals: list[tuple[str, bytes]]
    """Sound files: what they are called, and what they hold."""
    read: Callable[[str, bytes], Any]
    """Raises what is wrong with a file."""
    change: Callable[[bytes, bytes, np.random.Generator], bytes]
    """(a file, another, randomness) to a file."""
    errors: tuple[type[Exception], ...]
    """That may be raised."""
    not_said: re.Pattern = PLAIN
    faults: Callable[[Any], str | None] = field(default=lambda result: None)
    """What is wrong with a result, or with an error; None for nothing."""


def target(kind: str) -> Target:
    from tests.fuzz import files, images

    return images.target(kind) if kind in images.KINDS else files.TARGETS[kind]()


def run(kind: str, count: int, seed: int) -> dict:
    """{"kind", "files", "opened", "refused", "findings", "slowest_seconds", "peak_mb"} of `count` mutated files."""
    total = {"kind": kind, "files": 0, "opened": 0, "refused": 0, "findings": [], "slowest_seconds": 0.0, "peak_mb": 0}
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        while total["files"] < count:
            start = total["files"]
            command = [sys.executable, "-m", "tests.fuzz", "--child", kind, str(start), str(count), str(seed)]
            done = subprocess.run([*command, str(progress)], capture_output=True, text=True)
            if done.returncode == 0:
                part = json.loads(done.stdout.splitlines()[-1])
            elif done.returncode > 0 or not progress.exists():
                raise RuntimeError(f"{kind}: the fuzzer itself has failed: {done.stderr[-2000:]}")
            else:
                part = json.loads(progress.read_text())
                number = start + part["files"]
                part["files"] += 1
                part["findings"].append({"number": number, "what": f"the process ended with {done.returncode}"})
            for name in ("files", "opened", "refused", "findings"):
                total[name] += part[name]
            for name in ("slowest_seconds", "peak_mb"):
                total[name] = max(total[name], part[name])
    return total


def mutated(kind: str, start: int, count: int, seed: int, what: Target | None = None) -> Iterator[tuple[str, bytes]]:
    """The files `start` to `count`, named; each depends on its number and the seed alone."""
    what = what or target(kind)
    for number in range(start, count):
        generator = np.random.default_rng([seed, *kind.encode(), number])
        first, second = generator.integers(len(what.originals), size=2)
        name, content = what.originals[first]
        yield name, what.change(content, what.originals[second][1], generator)


def child(kind: str, start: int, count: int, seed: int, progress: Path) -> None:
    """Reads the files in this process; prints what `run` adds up, and keeps it in `progress` on the way."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    what = target(kind)
    for name, content in what.originals:
        what.read(name, content)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = {"files": 0, "opened": 0, "refused": 0, "findings": [], "slowest_seconds": 0.0, "peak_mb": 0}
    descriptor = os.open(progress, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for name, content in mutated(kind, start, count, seed, what):
        words = json.dumps(part).encode()
        os.ftruncate(descriptor, os.pwrite(descriptor, words, 0))
        # Ends the process, also out of a decoder's own loop.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        began, found = time.process_time(), None
        try:
            found = what.faults(what.read(name, content))
            part["opened"] += 1
        except what.errors as error:
            part["refused"] += 1
            found = what.faults(error)
            if what.not_said.search(str(error)) or "needs more memory" in str(error):
                found = f"text: {str(error)!r:.500}"
        except BaseException as error:  # noqa: BLE001 - that there is none is what this looks for
            found = f"{type(error).__name__}: {error}"[:300]
        signal.setitimer(signal.ITIMER_PROF, 0)
        if found is not None:
            part["findings"].append({"number": start + part["files"], "what": found})
        part["files"] += 1
        part["slowest_seconds"] = max(part["slowest_seconds"], round(time.process_time() - began, 2))
        part["peak_mb"] = max(part["peak_mb"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    print(json.dumps(part))
