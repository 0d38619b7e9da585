"""The clock of the day is set by hours, forward and back: nothing expires, hangs or is lost by that.

`tests/faults/clock` is the clock that a test can set. With everything on that clock, as servers would be that measure
durations with it, the same checks have to fail.
"""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.faults.commands import COMMANDS, argv
from tests.faults.kills import ENVIRONMENT, ROOT
from tests.faults.servers import ENV
from tests.security.page_visitor import Visitor, question
from tests.serve.processes import Process, free_port, wait_until

HOURS = 5 * 3600
TIMEOUT = 8  # seconds of the worker for an answer
THUMBNAIL = '<img class=\\"thumb\\"'
FREE, LIMITED = "key-without-limit", "key-with-a-limit"


class Clock:
    """The clock of all processes that get `env`."""

    def __init__(self, file: Path):
        self.file = file
        self.set(0)
        paths = (Path(__file__).with_name("clock"), ROOT)
        self.env = {"LLAVA_TEST_CLOCK": str(file), "PYTHONPATH": os.pathsep.join(map(str, paths))}

    def set(self, error: float | str) -> None:
        """`error` seconds off, or `jumping` at every look."""
        waiting = self.file.with_suffix(".new")
        waiting.write_text(str(error))
        waiting.replace(self.file)


@pytest.fixture
def clock(tmp_path):
    return Clock(tmp_path / "clock")


class Servers:
    """Controller, scripted worker and API by one clock; `more` is the environment of the first and the last."""

    def __init__(self, clock: Clock, folder: Path, **more: str):
        self.env, self.more = {**ENV, **clock.env}, more
        self.folder, self.ports, self.running = folder, {}, {}
        (folder / "keys").touch(0o600)
        (folder / "keys").write_text(f"free {FREE}\nlimited {LIMITED} 2\n")

    def start(self, name: str) -> Process:
        port = self.ports.setdefault(name, free_port())
        modules = {"controller": "llava.serve.controller", "api": "llava.serve.openai_api_server"}
        words = [] if name == "controller" else ["--controller", self.running["controller"].url]
        words += ["--api-key-file", str(self.folder / "keys")] if name == "api" else []
        words += ["--timeout", str(TIMEOUT)] if name == "worker" else []
        module = modules.get(name, "tests.serve.scripted_worker")
        env = self.env if name == "worker" else {**self.env, **self.more}
        self.running[name] = Process(module, *words, port=port, env=env, log=self.folder / name)
        return self.running[name].wait()

    def __enter__(self) -> "Servers":
        for name in ("controller", "worker", "api"):
            self.start(name)
        wait_until(lambda: self.models() == ["scripted"], 60)
        return self

    def __exit__(self, *_) -> None:
        for process in self.running.values():
            process.kill()

    def models(self) -> list[str]:
        url = self.running["api"].url + "/v1/models"
        reply = httpx.get(url, headers={"authorization": f"Bearer {FREE}"}).json()
        return [entry["id"] for entry in reply.get("data", ())]

    def are_answering(self) -> bool:
        url, headers = self.running["worker"].url + "/worker_get_status", {"x-llava-secret": ENV["LLAVA_SERVE_SECRET"]}
        return httpx.post(url, headers=headers).json()["stats"]["running"] > 0

    def ask(self, text: str, key: str = FREE) -> httpx.Response:
        body = {"model": "scripted", "messages": [{"role": "user", "content": text}], "max_tokens": 10_000}
        url, headers = self.running["api"].url + "/v1/chat/completions", {"authorization": f"Bearer {key}"}
        return httpx.post(url, json=body, headers=headers, timeout=60)


def test_servers(clock, tmp_path):
    with Servers(clock, tmp_path) as servers, ThreadPoolExecutor(1) as pool:
        assert [servers.ask("one", LIMITED).status_code for _ in range(3)] == [200, 200, 429]
        for error in (HOURS, -HOURS):
            slow = pool.submit(servers.ask, "slow")
            wait_until(servers.are_answering, 60)
            clock.set(error)
            time.sleep(2.2)  # the controller looks for dead workers every second
            assert servers.models() == ["scripted"]
            refused = servers.ask("one", LIMITED)
            assert refused.status_code == 429 and 0 < int(refused.headers["retry-after"]) <= 60
            assert slow.result().status_code == 200
        # As the clock goes back, deadlines stay, and heartbeats don't stop.
        held = pool.submit(servers.ask, "hold")
        wait_until(servers.are_answering, 60)
        clock.set(-3 * HOURS)
        servers.running["controller"].kill()
        servers.start("controller")
        wait_until(lambda: servers.models() == ["scripted"], 60)
        assert held.result().status_code == 504
    for name in servers.running:
        assert "Traceback" not in (tmp_path / name).read_text()


def test_servers_that_measure_by_the_clock_of_the_day(clock, tmp_path):
    with Servers(clock, tmp_path, LLAVA_TEST_CLOCK_ALL="1") as servers:
        assert [servers.ask("one", LIMITED).status_code for _ in range(3)] == [200, 200, 429]
        clock.set(HOURS)
        wait_until(lambda: servers.models() == [], 60)
        assert servers.ask("one", LIMITED).status_code != 429


@pytest.mark.parametrize("forgets", [False, True], ids=["ours", "by the clock of the day"])
def test_what_a_visitor_has_begun_stays(clock, tmp_path, forgets):
    env = {**clock.env, "LLAVA_SERVE_SECRET": "s3cret"} | ({"LLAVA_TEST_CLOCK_ALL": "1"} if forgets else {})
    words = ["--controller", "http://127.0.0.1:1"]
    with Process("llava.serve.gradio_web_server", *words, env=env, log=tmp_path / "page") as page:
        visitor = Visitor(page.wait(seconds=500).url)
        _, events = visitor.send(
            visitor.body([None, question(text=""), None], "examples", "select", event_data={"index": 0, "value": ""})
        )
        assert THUMBNAIL in events
        clock.set(HOURS)
        time.sleep(2.2)  # gradio looks for old conversations every second
        settings = [
            each["props"]["value"]
            for each in visitor.config["components"]
            if (each["props"].get("elem_id") or "").startswith("setting-")
        ]
        unfinished = [None, question(text=""), None, "none", *settings]
        _, events = visitor.send(visitor.body(unfinished, "box", "submit"))
        assert "Write a question too" in events and (THUMBNAIL in events) is not forgets


@pytest.mark.parametrize(
    "name",
    ["generation", "download", *(pytest.param(name, marks=pytest.mark.long) for name in ("answering", "judging"))],
)
def test_commands_write_what_they_would_have(name, clock, tmp_path):
    command = COMMANDS[name]
    clock.set("jumping")
    (tmp_path / "inputs").mkdir()
    with command.prepare(tmp_path / "inputs") as words:
        for folder, more in (("whole", {}), ("jumping", clock.env)):
            (tmp_path / folder).mkdir()
            run(words(tmp_path / folder), more)
    assert command.content(tmp_path / "jumping" / command.output) == command.content(
        tmp_path / "whole" / command.output
    )


@pytest.mark.long
def test_training_and_resuming(clock, tmp_path):
    """The run that jumps is stopped after half of its steps, and goes on."""
    command = COMMANDS["training"]
    clock.set("jumping")
    (tmp_path / "inputs").mkdir()
    with command.prepare(tmp_path / "inputs") as words:
        run(words(tmp_path / "whole"), {})
        out = tmp_path / "jumping"
        killed = subprocess.Popen(argv(words(out)), cwd=ROOT, env=ENVIRONMENT | clock.env, stderr=subprocess.DEVNULL)
        wait_until(lambda: any((out / "model").glob("checkpoint-*")) or killed.poll() is not None, 240)
        killed.kill()
        killed.wait()
        done = run([*words(out), "--disable_tqdm", "False"], clock.env)
    assert command.content(out / "model") == command.content(tmp_path / "whole" / "model")
    bar = done.stderr.replace("\r", "\n")
    assert "training: 100%" in bar and "-1 day" not in bar
    history = json.loads((out / "model" / "trainer_state.json").read_text())["log_history"]
    summary = json.loads((out / "model" / "training_summary.json").read_text())
    measured = [entry[name] for entry in history for name in entry if name.endswith(("_runtime", "_per_second"))]
    assert len(measured) >= 2 and all(0 < each < HOURS for each in measured), history
    assert 0 < summary["seconds"] < HOURS / 5


def test_a_date_to_ask_again_is_taken_by_the_servers_clock(clock, tmp_path):
    """Ours is five hours behind: the date would be as far away."""
    from llava.records import write_records
    from tests.openai_server import OpenAIServer

    clock.set(-HOURS)
    write_records(tmp_path / "figures.jsonl", [{"id": f"f{number}", "caption": f"{number}."} for number in range(4)])
    with OpenAIServer("--mode", "dialogue", "--faults", "1", "--kinds", "date") as server:
        words = ["-m", "llava.instruct.instruct_generate", "--input_path", str(tmp_path / "figures.jsonl")]
        words += ["--api-base", server.url, "--api-model", "m", "--output_path", str(tmp_path / "out.jsonl")]
        run(words, clock.env)
        assert len(server.stats()["faulted"]) == 4
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4


def test_a_bar_goes_on(clock):
    """Under a clock that goes back, tqdm's own bar stands still and ours doesn't."""
    script = (
        "import io, sys, time\n"
        "from {module} import tqdm\n"
        "file, clock = io.StringIO(), open(sys.argv[1], 'w')\n"
        "with tqdm(total=3, file=file, mininterval=0) as bar:\n"
        "    clock.write('-18000'); clock.flush()\n"
        "    bar.update(2)\n"
        "    print('2/3' in file.getvalue())"
    )
    for module, goes_on in (("tqdm", "False"), ("llava.bars", "True")):
        clock.set(0)
        done = run(["-c", script.format(module=module), str(clock.file)], clock.env)
        assert done.stdout.strip() == goes_on, module


def test_the_clock_is_the_childs(clock):
    clock.set(HOURS)
    wrong, steady = run(["-c", "import time; print(time.time(), time.monotonic())"], clock.env).stdout.split()
    assert abs(float(wrong) - time.time() - HOURS) < 60 and abs(float(steady) - time.monotonic()) < 60


def run(words: list[str], more: dict[str, str]) -> subprocess.CompletedProcess:
    done = subprocess.run(argv(words), cwd=ROOT, env=ENVIRONMENT | more, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
