"""Steps of a pipeline: each runs once for its settings, some side by side, all with a bar.

A finished step leaves a marker with its key; another run with the same key skips it.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from llava.errors import LlavaError
from llava.records import read_json, write_json

_COUNT = re.compile(rb"(\d+)/(\d+) \[")
"""How tqdm writes where it is."""


@dataclass(frozen=True)
class Job:
    """A command of one step. `outputs` are removed before it starts: what a killed run left."""

    name: str
    argv: list[str]
    outputs: list[Path]
    threads: int = 1


class Pipeline:
    """Runs steps in a folder, numbered up to `count`; markers lie in `done/`, what commands say in `logs/`."""

    def __init__(self, folder: Path, key: Any, count: int):
        self.folder = folder
        self.key = key
        self.number, self.count = 0, count
        self.console = Console(stderr=True)
        self.seconds: dict[str, float] = {}
        """Of each step."""
        self.total = 0.0
        """Of the whole, with steps side by side counted once; what was done before counts too."""
        for name in ("done", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def call(self, name: str, title: str, function: Callable[[], Any], settings: Any) -> None:
        """A step of this process."""
        title = self._numbered(title)
        key = self._begin(name, settings)
        if key is None:
            self._say(f"{title}: done before")
        else:
            self._say(title)
            started = time.monotonic()
            function()
            self._finish(name, key, time.monotonic() - started)
        self.total += self.seconds[name]

    def run(self, title: str, jobs: Sequence[Job]) -> None:
        """A step of commands side by side, as processes; each has a marker of its own.

        Raises:
            LlavaError: a command failed; the message holds its last words and where its log is.
        """
        title = self._numbered(title)
        waiting = [(job, key) for job in jobs if (key := self._begin(job.name, job.argv)) is not None]
        self._say(title if waiting else f"{title}: done before")
        if waiting:
            for job in jobs:
                if job not in [started for started, _ in waiting]:
                    self._say(f"  {job.name}: done before")
            self._run(waiting)
        self.total += max(self.seconds[job.name] for job in jobs)

    def _run(self, waiting: list[tuple[Job, str]]) -> None:
        bar = Progress(
            TextColumn("  {task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        started = time.monotonic()
        with bar:
            running = [_Running(job, key, self.folder / "logs", bar) for job, key in waiting]
            try:
                while not all(process.finished() for process in running):
                    for process in running:
                        process.show()
                        if process.failed():
                            raise LlavaError(process.complaint())
                    time.sleep(0.2)
                for process in running:
                    if process.failed():
                        raise LlavaError(process.complaint())
                    process.show()
            finally:
                for process in running:
                    process.stop()
        for process in running:
            self._finish(process.job.name, process.key, process.seconds or time.monotonic() - started)

    def _begin(self, name: str, settings: Any) -> str | None:
        """The step's key if it has to run, else None. Settings of a step decide all later ones too."""
        # Each key holds those before it.
        self.key = hashlib.sha256(json.dumps([self.key, name, settings], sort_keys=True).encode()).hexdigest()
        marker = self.folder / "done" / f"{name}.json"
        if marker.is_file() and read_json(marker).get("key") == self.key:
            self.seconds[name] = read_json(marker)["seconds"]
            return None
        marker.unlink(missing_ok=True)
        return self.key

    def _finish(self, name: str, key: str, seconds: float) -> None:
        self.seconds[name] = round(seconds, 1)
        write_json(self.folder / "done" / f"{name}.json", {"key": key, "seconds": round(seconds, 1)})

    def _numbered(self, title: str) -> str:
        self.number += 1
        return f"{self.number}/{self.count} {title}"

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)


class _Running:
    """A started command."""

    def __init__(self, job: Job, key: str, logs: Path, bar: Progress):
        self.job, self.key, self.bar = job, key, bar
        self.log = logs / f"{job.name}.log"
        self.seconds: float | None = None
        for output in job.outputs:
            if output.is_dir():
                shutil.rmtree(output)
            output.unlink(missing_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(job.threads),
            "MKL_NUM_THREADS": str(job.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *job.argv], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self.task = bar.add_task(job.name.replace("_", " "), total=None, note="starting")

    def show(self) -> None:
        """Bring the bar to where the command's own is."""
        if self.finished():
            self.bar.update(self.task, total=1, completed=1, note="")
            return
        found = _COUNT.findall(self._tail(4000))
        if found:
            self.bar.update(self.task, completed=int(found[-1][0]), total=int(found[-1][1]), note="")

    def finished(self) -> bool:
        if self.process.poll() is None:
            return False
        if self.seconds is None:
            self.seconds = time.monotonic() - self.started
        return True

    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def complaint(self) -> str:
        lines = self._tail(3000).decode(errors="replace").replace("\r", "\n").strip().split("\n")
        return f"{self.job.name} failed with exit code {self.process.returncode}: {lines[-1]} (log: {self.log})"

    def stop(self) -> None:
        """End the command and whatever it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)

    def _tail(self, size: int) -> bytes:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - size))
            return file.read()
