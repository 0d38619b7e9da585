"""The real servers, started once for all attacks, and the open one beside them."""

from dataclasses import dataclass

import pytest

from tests.serve.browsing import browser
from tests.serve.processes import Process

__all__ = ["browser", "stack"]

SECRET = "s3cret-of-the-tests"
KEY = "key-for-the-tests"
PIECES = ("controller", "worker", "api", "page")


@dataclass
class Stack:
    """Controller, scripted worker, API and page, each with what lets a request in; `open` has no protection."""

    processes: dict[str, Process]

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    def credentials(self, name: str) -> dict[str, str]:
        if name == "api":
            return {"authorization": f"Bearer {KEY}"}
        return {"x-llava-secret": SECRET} if name in ("controller", "worker") else {}


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    env = {"LLAVA_SERVE_SECRET": SECRET}
    logs = tmp_path_factory.mktemp("logs")
    started: dict[str, Process] = {}

    def start(name: str, module: str, *words: str, **more) -> None:
        started[name] = Process(module, *words, env={**env, **more}, log=logs / name)

    try:
        start("open", "tests.security.standins")
        start("controller", "llava.serve.controller")
        controller = ["--controller", started["controller"].url]
        start("page", "llava.serve.gradio_web_server", *controller)
        start("worker", "tests.serve.scripted_worker", *controller, "--pause", "0.02", "--timeout", "600")
        start("api", "llava.serve.openai_api_server", *controller, LLAVA_API_KEYS=KEY)
        for process in started.values():
            process.wait(seconds=500)
        started["api"].wait("/health")
        yield Stack(started)
    finally:
        for process in started.values():
            process.kill()
