"""Start servers as real processes on free ports, wait until they answer, and stop them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


TINY_ENV = {"LLAVA_SERVE_SECRET": "s3cret", "OMP_NUM_THREADS": "1"}
"""Of the processes that serve a tiny model."""


class Process:
    """`python -m module …` with its own port; `url` is where it answers, `log` what it wrote."""

    def __init__(self, module: str, *words: str, port: int | None = None, env: dict | None = None, log=None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(log) if log else Path(tempfile.mkstemp(prefix="llava-test-")[1])
        command = [sys.executable, "-m", module, "--port", str(self.port), *words]
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=stream, stderr=stream)

    def wait(self, path: str = "/health", seconds: float = 240.0) -> "Process":
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                said = self.log.read_text()[-3000:]
                raise AssertionError(f"ended with {self.process.returncode} before it answered: {said}")
            try:
                if httpx.get(self.url + path).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"no answer from {self.url}{path}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 20.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()
        if self.log.name.startswith("llava-test-"):
            self.log.unlink(missing_ok=True)


def files_below(*folders: Path) -> dict[Path, bytes]:
    """The content of all files below the folders, of which a running server may remove some meanwhile."""
    found = {}
    for path in (Path(where) / name for folder in folders for where, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                found[path] = path.read_bytes()
    return found


def wait_until(condition, seconds: float) -> None:
    """Return once `condition()` is true; an AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
