"""The servers as `python -m llava.serve` starts them, seen from outside: their processes, memory and files."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.serve.processes import free_port

KEY = "key-of-the-soak"
MODEL = "tiny"
SERVERS = ("controller", "worker-0", "worker-1", "api", "page")
SHARED_MEMORY = Path("/dev/shm")
PRIVATE = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=128m tmpfs {SHARED_MEMORY} && exec "$@"', "sh"]
"""A command with a file system of its own where the page keeps uploads, so that it can be filled without harm."""
STOP_SECONDS = 90.0
CACHE_MB = 16
"""Of a worker, so that what it keeps of earlier questions and images is soon as much as it may be."""


@dataclass(frozen=True)
class Sample:
    """What a process took at a moment (`time.monotonic`): bytes, and open files."""

    name: str
    pid: int
    when: float
    rss: int
    pss: int
    files: int


class Stack:
    """`llava.serve` with two workers of one model. `log` is what all of them wrote."""

    def __init__(self, folder: Path):
        self.log = folder / "log"
        self.keys = folder / "keys"
        self.keys.write_text(f"soak {KEY}\n")
        self.keys.chmod(0o600)
        self.model = _model(folder)
        self.ports = dict(zip(SERVERS, _neighbouring_ports(len(SERVERS)), strict=True))
        self.has_own_memory = subprocess.run([*PRIVATE, "true"], capture_output=True).returncode == 0

    def __enter__(self) -> "Stack":
        ports = self.ports
        words = [sys.executable, "-m", "llava.serve", "--device", "cpu", "--cache-mb", str(CACHE_MB)]
        words += ["--model-path", str(self.model), "--model-name", MODEL] * 2
        words += ["--controller-port", str(ports["controller"]), "--worker-port", str(ports["worker-0"])]
        words += ["--api-port", str(ports["api"]), "--web-port", str(ports["page"]), "--api-key-file", str(self.keys)]
        environment = {**os.environ, "LLAVA_SERVE_SECRET": "s3cret-of-the-soak", "OMP_NUM_THREADS": "1"}
        command = [*PRIVATE, *words] if self.has_own_memory else words
        with self.log.open("wb") as log:
            self.supervisor = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> int | None:
        """End all of it in order; the exit code, or None if it had to be killed."""
        left = psutil.Process(self.supervisor.pid).children(recursive=True) if self.supervisor.poll() is None else []
        self.supervisor.send_signal(signal.SIGTERM)
        try:
            return self.supervisor.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()
            return None
        finally:
            for process in left:
                with suppress(psutil.Error):
                    process.kill()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    @property
    def page_url(self) -> str:
        """With a visitor's password in it."""
        return f"http://visitor:{KEY}@127.0.0.1:{self.ports['page']}"

    def process(self, name: str) -> psutil.Process | None:
        """One of the servers, if it runs now."""
        return self._named().get(name)

    def uploads(self) -> Path:
        """The page's own memory file system, as seen from here."""
        page = self.process("page")
        assert page is not None
        return Path(f"/proc/{page.pid}/root{SHARED_MEMORY}")

    def samples(self) -> list[Sample]:
        """Of the servers and of the processes that open images for them."""
        found = []
        for name, process in self._named().items():
            children = [(f"{name} decoder", child) for child in _children(process)]
            for each, one in [(name, process), *children]:
                with suppress(psutil.Error):
                    memory = one.memory_full_info()
                    found.append(Sample(each, one.pid, time.monotonic(), memory.rss, memory.pss, one.num_fds()))
        return found

    def _named(self) -> dict[str, psutil.Process]:
        names = {str(port): name for name, port in self.ports.items()}
        found = {}
        for child in _children(psutil.Process(self.supervisor.pid)):
            with suppress(psutil.Error, ValueError, IndexError):
                words = child.cmdline()
                found[names[words[words.index("--port") + 1]]] = child
        return found

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 600
        while "ready; " not in self.log.read_text(errors="replace"):
            if self.supervisor.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"it doesn't start: {self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return process.children()
    return []


def _model(folder: Path) -> Path:
    """A tiny checkpoint, made in a process of its own: torch isn't needed here."""
    program = "import sys; from tests.tiny import make_llava; make_llava(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(folder / "model")], check=True, capture_output=True)
    return folder / "model" / "llava"


def _neighbouring_ports(count: int) -> list[int]:
    """Free ports; workers have neighbouring ones."""
    while True:
        first = free_port()
        with suppress(OSError):
            if _all_free(range(first, first + count)):
                return list(range(first, first + count))


def _all_free(ports: range) -> bool:
    import socket

    for port in ports:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
    return True
