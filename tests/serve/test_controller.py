"""The controller as a process, over real sockets: registering, dispatch, forwarding, and strangers kept out."""

import asyncio
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from llava.serve import controller as controller_module
from llava.serve import model_worker
from llava.serve.client import ServingClient
from llava.serve.protocol import split_chunks
from llava.serve.secret import HEADER
from tests.serve.fake_worker import FakeWorker
from tests.serve.processes import Process, free_port

SECRET = {HEADER: "s3cret"}


@pytest.fixture(scope="module")
def controller():
    env = {"LLAVA_SERVE_SECRET": "s3cret"}
    with Process("llava.serve.controller", "--host", "0.0.0.0", "--max-body-bytes", "100000", env=env) as process:
        yield process.wait()


def post(controller, path, headers=SECRET, **body):
    return httpx.post(controller.url + path, json=body, headers=headers, timeout=20)


def register(controller, worker, **more):
    return post(controller, "/register_worker", worker_name=worker.url, check_heart_beat=False, **more)


def stream(controller, **body):
    chunks, rest = split_chunks(post(controller, "/worker_generate_stream", **body).content)
    assert rest == b""
    return chunks


def test_its_log_names_the_module(controller):
    assert "INFO llava.serve.controller: controller ready" in controller.log.read_text().splitlines()


def test_starts_without_torch():
    script = (
        "import sys, llava.serve.controller as c; c.build_parser(); import fastapi; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_register_list_and_forward(controller):
    with FakeWorker(models=("llava-med", "other")) as worker:
        assert register(controller, worker).status_code == 200
        assert post(controller, "/list_models").json()["models"] == ["llava-med", "other"]
        assert post(controller, "/get_worker_address", model="other").json()["address"] == worker.url
        assert [chunk["text"] for chunk in stream(controller, model="other", prompt="x")] == ["a", "b", "c"]
        path, headers, body = worker.requests[-1]
        assert (path, json.loads(body)) == ("/worker_generate_stream", {"model": "other", "prompt": "x"})
        assert {name.lower(): value for name, value in headers.items()}[HEADER] == "s3cret"
    assert post(controller, "/refresh_all_workers").json() == {"models": []}


def test_strangers_stay_out(controller):
    with FakeWorker() as worker:
        for headers in ({}, {HEADER: "wrong"}):
            for path in ("/register_worker", "/list_models", "/worker_generate_stream", "/refresh_all_workers"):
                reply = post(controller, path, headers=headers, worker_name=worker.url, model="m")
                assert reply.status_code == 401, path
                assert reply.json()["error"]["type"] == "unauthorized"
                assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]
        assert worker.requests == [], "a stranger made the controller call an address"


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:1/x?y=",
        "file:///etc/passwd",
        "http://u:p@127.0.0.1:1",
        "127.0.0.1:9",
        "http://127.0.0.1",
        "gopher://h:1",
    ],
)
def test_what_is_no_worker_address_is_refused(controller, address):
    status = {"model_names": ["evil"], "speed": 1, "queue_length": 0}
    reply = post(controller, "/register_worker", worker_name=address, worker_status=status)
    assert reply.status_code == 400
    assert "evil" not in post(controller, "/list_models").json()["models"]


def test_a_client_cannot_name_an_address(controller):
    with FakeWorker() as worker:
        chunk = stream(controller, model="none-such", worker_address=worker.url, address=worker.url)[0]
        assert chunk["error_type"] == "no_worker"
        assert chunk["error_code"] != 0
        assert "none-such" in chunk["text"]
        assert worker.requests == []


def test_the_card_of_a_model_is_passed_on(controller):
    with FakeWorker(models=("carded",)) as worker:
        worker.status["card"] = {"trained_on": "x", "context": "2,048 tokens", "unknown": "field"}
        assert register(controller, worker).status_code == 200

        async def cards():
            client = ServingClient(controller.url, SECRET[HEADER])
            try:
                return await client.cards()
            finally:
                await client.close()

        card = asyncio.run(cards())["carded"]
        assert (card.trained_on, card.context, card.base) == ("x", "2,048 tokens", None)
        worker.status["card"] = {"trained_on": "x" * 501}
        assert register(controller, worker).status_code == 400


def test_a_dead_worker_is_passed_over(controller):
    status = {"model_names": ["m"], "speed": 1000, "queue_length": 0}
    dead = f"http://127.0.0.1:{free_port()}"
    with FakeWorker() as worker:
        register(controller, worker)
        post(controller, "/register_worker", worker_name=dead, worker_status=status, check_heart_beat=False)
        assert [chunk["text"] for chunk in stream(controller, model="m")] == ["a", "b", "c"]
        assert post(controller, "/get_worker_address", model="m").json()["address"] == worker.url
    post(controller, "/refresh_all_workers")


def test_a_worker_lost_in_the_middle_is_said(controller):
    with FakeWorker(break_after=2) as worker:
        register(controller, worker)
        chunks = stream(controller, model="m")
    assert [chunk["text"] for chunk in chunks[:2]] == ["a", "b"]
    assert chunks[-1]["error_type"] == "worker_lost"
    assert chunks[-1]["request_id"].startswith("req-")
    post(controller, "/refresh_all_workers")


@pytest.mark.parametrize(
    ("status", "kind", "tries_another"), [(503, "server_busy", True), (413, "too_large", False), (500, None, True)]
)
def test_what_a_worker_refuses_is_passed_on(controller, status, kind, tries_another):
    """Another worker may have a place; to what is too large all say the same."""
    said = {"error": {"type": kind, "message": "The words of the worker."}} if kind else {"detail": "?"}
    with FakeWorker(refusal=(status, said)) as worker, FakeWorker(refusal=(status, said)) as other:
        register(controller, worker)
        register(controller, other)
        (chunk,) = stream(controller, model="m")
        assert chunk["error_type"] == (kind or "worker_lost")
        assert (chunk["text"] == "The words of the worker.") is bool(kind)
        asked = [each for each in (worker, other) if any("stream" in path for path, *_ in each.requests)]
        assert len(asked) == (2 if tries_another else 1)
    post(controller, "/refresh_all_workers")


def test_it_waits_longer_than_a_worker():
    """An answer that comes whole may be silent for as long as a worker lets it take."""
    assert model_worker.build_parser().get_default("request_timeout") < controller_module.READ_TIMEOUT


def test_refresh_keeps_the_living(controller):
    with FakeWorker(models=("stays",)) as alive:
        register(controller, alive)
        with FakeWorker(models=("goes",)) as gone:
            register(controller, gone)
        assert post(controller, "/refresh_all_workers").json() == {"models": ["stays"]}
    post(controller, "/refresh_all_workers")


def test_a_worker_that_leaves_while_it_is_asked_is_gone(controller):
    with FakeWorker(models=("leaves",)) as worker:
        register(controller, worker, worker_status=worker.status)
        worker.on_status = lambda: post(controller, "/unregister_worker", worker_name=worker.url)
        assert post(controller, "/refresh_all_workers").json() == {"models": []}


def test_a_worker_that_registers_while_it_is_asked_is_what_it_said_then(controller):
    with FakeWorker(models=("before",)) as worker:
        register(controller, worker, worker_status=worker.status)
        anew = worker.status | {"model_names": ["anew"]}
        worker.on_status = lambda: register(controller, worker, worker_status=anew)
        assert post(controller, "/refresh_all_workers").json() == {"models": ["anew"]}
    post(controller, "/refresh_all_workers")


def test_a_status_without_end_is_none(controller):
    memory = Path(f"/proc/{controller.process.pid}/status")
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", memory.read_text())[1])  # noqa: E731
    before = peak()
    with FakeWorker() as worker:
        worker.status |= {"more": " " * (200 << 20)}
        reply = register(controller, worker)
    assert reply.status_code == 400 and "doesn't tell its status" in reply.json()["error"]["message"]
    assert peak() - before < 100 << 10


def test_heartbeat_of_an_unknown_worker_asks_it_to_register(controller):
    reply = post(controller, "/receive_heart_beat", worker_name="http://127.0.0.1:9", queue_length=0)
    assert reply.json() == {"exist": False}


def test_large_and_broken_bodies_are_refused(controller):
    big = httpx.post(controller.url + "/list_models", content=b"x" * 100001, headers=SECRET)
    assert (big.status_code, big.json()["error"]["type"]) == (413, "too_large")

    def without_length():
        for _ in range(30):
            yield b"x" * 10000

    try:
        chunked = httpx.post(controller.url + "/get_worker_address", content=without_length(), headers=SECRET)
        assert chunked.status_code == 413
    except httpx.WriteError:
        pass  # the server closed the connection while we were still sending, which is as good
    broken = httpx.post(controller.url + "/get_worker_address", content=b"{", headers=SECRET)
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "bad_request")


def test_health_answers_while_a_stream_runs(controller):
    with FakeWorker(words=("a",) * 20, delay=0.05) as worker:
        register(controller, worker)
        request = {"model": "m"}
        with httpx.stream("POST", controller.url + "/worker_generate_stream", json=request, headers=SECRET) as reply:
            pieces = reply.iter_raw()
            next(pieces)
            for _ in range(5):
                assert httpx.get(controller.url + "/health", timeout=2).json() == {"status": "ok"}
            assert b"".join(pieces)
    post(controller, "/refresh_all_workers")


def test_secret_file_is_made_private_and_shared_by_processes(tmp_path):
    env = {"XDG_STATE_HOME": str(tmp_path), "LLAVA_SERVE_SECRET": ""}
    with Process("llava.serve.controller", env=env) as process:
        process.wait()
        path = tmp_path / "llava" / "serve-secret"
        assert path.stat().st_mode & 0o777 == 0o600
        headers = {HEADER: path.read_text().strip()}
        assert post(process, "/list_models", headers=headers).status_code == 200
        assert post(process, "/list_models", headers={}).status_code == 401
        assert process.stop() in (0, -15)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(b"x", 0o644, "chmod 600"), (b"\xff\xfe", 0o600, "is no text"), (b"\n", 0o600, "is empty")],
)
def test_a_secret_that_cannot_be_used_is_refused(tmp_path, content, mode, words):
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    command = [sys.executable, "-m", "llava.serve.controller", "--port", "1", "--secret-file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr


def test_open_takes_an_explicit_flag(tmp_path):
    with Process("llava.serve.controller", "--open-to-everyone") as process:
        process.wait()
        assert post(process, "/list_models", headers={}).json()["models"] == []
        status = {"model_names": ["m"], "speed": 1, "queue_length": 0}
        for address, code in (("http://127.0.0.1:1", 200), ("http://127.0.0.1:2", 200), ("http://127.0.0.2:1", 400)):
            body = {"worker_name": address, "worker_status": status}
            assert post(process, "/register_worker", headers={}, **body).status_code == code, "a name has one owner"


def test_expiry_and_dispatch_without_network():
    from random import Random

    from llava.serve.registry import Registry
    from llava.serve.request_models import WorkerStatus

    now = [0.0]
    registry = Registry("shortest_queue", clock=lambda: now[0], dice=Random(0))
    for port, queue in ((1, 5), (2, 1)):
        registry.register(f"http://h:{port}", WorkerStatus(model_names=["m"], queue_length=queue))
    assert [registry.choose("m") for _ in range(6)] == ["http://h:2"] * 4 + ["http://h:1", "http://h:2"]
    now[0] = 20.0
    assert registry.heartbeat("http://h:1", 0)
    now[0] = 31.0
    assert registry.choose("m") == "http://h:1"
    assert list(registry.workers) == ["http://h:1"]
    now[0] = 62.0
    assert registry.status() == {"model_names": [], "speed": 0, "queue_length": 0}, "of those that are left"
    lottery = Registry("lottery", clock=lambda: 0.0, dice=Random(0))
    for port, speed in ((1, 1), (2, 3)):
        lottery.register(f"http://h:{port}", WorkerStatus(model_names=["m"], speed=speed))
    picks = [lottery.choose("m") for _ in range(2000)]
    assert 0.70 < picks.count("http://h:2") / 2000 < 0.80


def test_workers_are_drawn_by_lottery_if_asked():
    with Process("llava.serve.controller", "--dispatch-method", "lottery", "--open-to-everyone") as process:
        process.wait()
        status = {"model_names": ["m"], "speed": 1, "queue_length": 0}
        for port in (1, 2):
            body = {"worker_name": f"http://127.0.0.1:{port}", "worker_status": status, "check_heart_beat": False}
            assert post(process, "/register_worker", headers={}, **body).status_code == 200
        picks = [post(process, "/get_worker_address", headers={}, model="m").json()["address"] for _ in range(40)]
    assert len(set(picks)) == 2
    assert any(one == following for one, following in pairwise(picks)), "the shortest queue would alternate"
