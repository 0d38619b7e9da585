"""Controller, two workers and the API under load, each of them killed and started again."""

import random
import threading
import time
from pathlib import Path

import httpx

from tests.serve.processes import Process, free_port, wait_until

ENV = {"LLAVA_SERVE_SECRET": "s3cret", "LLAVA_API_KEYS": "key-for-tests"}
KEY = {"authorization": "Bearer key-for-tests"}
PIECES = ("controller", "worker-0", "worker-1", "api")
PATIENCE = 90.0  # seconds in which a question has to be answered, asked again after each failure
AGAIN = {429, 502, 503}  # typed: ask again


class Stack:
    """The processes by name, each on a port of its own that it comes back to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ports = {name: free_port() for name in PIECES}
        self.running: dict[str, Process] = {}

    def start(self, name: str) -> None:
        module = {"controller": "llava.serve.controller", "api": "llava.serve.openai_api_server"}
        words = [] if name == "controller" else ["--controller", f"http://127.0.0.1:{self.ports['controller']}"]
        words += ["--pause", "0.01"] if name.startswith("worker") else []
        chosen = module.get(name, "tests.serve.scripted_worker")
        log = self.folder / name
        self.running[name] = Process(chosen, *words, port=self.ports[name], env=ENV, log=log)

    def __enter__(self) -> "Stack":
        for name in PIECES:
            self.start(name)
        for process in self.running.values():
            process.wait()
        wait_until(lambda: self.models() == 1, 60)
        return self

    def __exit__(self, *_) -> None:
        for process in self.running.values():
            process.kill()

    def models(self) -> int:
        url = f"http://127.0.0.1:{self.ports['api']}/v1/models"
        try:
            return len(httpx.get(url, headers=KEY).json()["data"])
        except (httpx.TransportError, KeyError):
            return 0

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.ports['api']}/v1/chat/completions"


def kill_servers(kills: int, moments: random.Random, folder: Path, pieces: tuple[str, ...] = PIECES) -> dict:
    """So many kills of random pieces while four clients ask; {"kills", "answered", "asked_again", "wrong"}."""
    asking = Asking()
    with Stack(folder) as stack:
        clients = [threading.Thread(target=asking.ask_for_ever, args=(stack.api, number)) for number in range(4)]
        for client in clients:
            client.start()
        try:
            for _ in range(kills):
                time.sleep(moments.uniform(0.1, 1.5))
                name = moments.choice(pieces)
                stack.running[name].kill()
                time.sleep(moments.uniform(0.0, 0.5))
                stack.start(name)
                stack.running[name].wait()
        finally:
            asking.stopping.set()
            for client in clients:
                client.join()
    for name in PIECES:
        if "Traceback" in (log := (folder / name).read_text(errors="replace")):
            asking.wrong.append(f"traceback in the log of {name}: {log[log.index('Traceback') :][-500:]}")
    return {"kills": kills, "answered": asking.answered, "asked_again": asking.again, "wrong": asking.wrong}


class Asking:
    """What clients saw; each asks the same question until it is answered, as clients of OpenAI's do."""

    def __init__(self):
        self.stopping = threading.Event()
        self.answered = self.again = 0
        self.wrong: list[str] = []

    def ask_for_ever(self, url: str, number: int) -> None:
        with httpx.Client(headers=KEY, timeout=60) as client:
            count = 0
            while not self.stopping.is_set() or count == 0:
                self._ask(client, url, f"client {number} question {count}")
                count += 1

    def _ask(self, client: httpx.Client, url: str, question: str) -> None:
        body = {"model": "scripted", "messages": [{"role": "user", "content": question}]}
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                reply = client.post(url, json=body)
            except httpx.TransportError:  # the API itself was killed
                self.again += 1
                time.sleep(0.1)
                continue
            if reply.status_code == 200:
                said = reply.json()["choices"][0]["message"]["content"]
                if said.split() != ["echo:", *question.split()]:
                    self.wrong.append(f"{question}: {said}")
                self.answered += 1
                return
            if reply.status_code not in AGAIN or "type" not in reply.json().get("error", {}):
                self.wrong.append(f"{question}: {reply.status_code} {reply.text[:200]}")
                return
            self.again += 1
            time.sleep(0.1)
        self.wrong.append(f"{question}: not answered in {PATIENCE} s")
