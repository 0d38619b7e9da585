"""A worker's HTTP side over real sockets: the stream, its errors, cancelling, draining, being known to a controller."""

import asyncio
import signal
import socket
import threading
import time

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from llava.serve.client import ServingClient
from llava.serve.protocol import split_chunks
from llava.serve.secret import HEADER
from llava.serve.worker.heartbeat import Membership
from tests.serve.processes import Process, wait_until

ENV = {"LLAVA_SERVE_SECRET": "s3cret"}
SECRET = {HEADER: "s3cret"}
MODULE = "tests.serve.scripted_worker"


@pytest.fixture(scope="module")
def worker():
    with Process(MODULE, "--pause", "0.02", env=ENV) as process:
        yield process.wait()


def ask(worker, prompt, **more):
    body = {"model": "scripted", "prompt": prompt, **more}
    reply = httpx.post(worker.url + "/worker_generate_stream", json=body, headers=SECRET, timeout=60)
    assert reply.status_code == 200
    chunks, rest = split_chunks(reply.content)
    assert rest == b""
    return chunks


def stats(worker):
    return httpx.post(worker.url + "/worker_get_status", headers=SECRET).json()["stats"]


def test_text_grows_behind_the_prompt_and_the_last_chunk_has_the_account(worker):
    chunks = ask(worker, "one two three")
    assert all(chunk["error_code"] == 0 and chunk["text"].startswith("one two three") for chunk in chunks)
    assert chunks[-1]["text"] == "one two threeecho: one two three "
    assert chunks[-1]["finish_reason"] == "stop"
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 0}
    assert chunks[-1]["request_id"].startswith("req-")
    assert 2 <= len(chunks) <= 5


def test_a_silent_connection_is_kept_longer_than_clients_keep_it(worker):
    """Else a client asks over one that is just being closed, and takes the worker for lost."""
    with httpx.Client(headers=SECRET, limits=httpx.Limits(keepalive_expiry=60)) as client:
        opened = []
        track = {"trace": lambda name, _: opened.append(name) if name == "connection.connect_tcp.started" else None}
        for pause in (0, 6):
            time.sleep(pause)
            client.post(worker.url + "/worker_get_status", extensions=track).raise_for_status()
    assert len(opened) == 1


def test_messages_give_the_answer_alone(worker):
    chunks = ask(worker, None, messages=[{"role": "user", "content": "hello"}])
    assert chunks[-1]["text"] == "echo: hello "


def test_chunks_are_gathered_and_unstreamed_answers_are_one(worker):
    words = " ".join(str(number) for number in range(50))
    assert len(ask(worker, words)) < 40
    assert len(ask(worker, words, stream=False)) == 1


def test_logprobs_come_with_each_token(worker):
    chunks = ask(worker, "a b", logprobs=1)
    tokens = [entry for chunk in chunks for entry in chunk["logprobs"]]
    assert [entry["token"] for entry in tokens] == ["echo: ", "a ", "b "]
    assert tokens[0]["top"] == [{"token": "echo:", "logprob": -0.5}]


@pytest.mark.parametrize(
    ("word", "error_type", "code"),
    [
        ("oom", "out_of_memory", 50002),
        ("context", "context_too_long", 40303),
        ("full", "queue_full", 50005),
        ("image", "bad_image", 40001),
        ("crash", "internal_error", 50001),
    ],
)
def test_errors_are_typed_and_say_nothing_of_the_inside(worker, word, error_type, code):
    (chunk,) = ask(worker, f"now {word}")
    assert (chunk["error_type"], chunk["error_code"]) == (error_type, code)
    assert chunk["request_id"].startswith("req-")
    assert "0x" not in chunk["text"] and "/secret" not in chunk["text"]


def test_broken_requests_are_refused(worker):
    assert ask(worker, None)[0]["error_type"] == "bad_request"
    assert ask(worker, "x", model="another")[0]["error_type"] == "no_worker"
    reply = httpx.post(worker.url + "/worker_generate_stream", content=b"[1]", headers=SECRET)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "bad_request")


def test_a_client_that_leaves_while_it_sends_is_no_failure(worker):
    request = (
        f"POST /worker_generate_stream HTTP/1.1\r\nHost: localhost\r\n{HEADER}: s3cret\r\nContent-Length: 999\r\n\r\n"
    )
    before = worker.log.read_text()
    with socket.create_connection(("127.0.0.1", worker.port)) as connection:
        connection.sendall(request.encode() + b'{"model": "scr')
    with pytest.raises(AssertionError):
        wait_until(lambda: worker.log.read_text() != before, seconds=1)
    assert ask(worker, "still there")[-1]["error_code"] == 0


def test_strangers_stay_out(worker):
    for path in ("/worker_generate_stream", "/worker_get_status"):
        assert httpx.post(worker.url + path, json={"prompt": "x"}).status_code == 401
    assert httpx.get(worker.url + "/health").json() == {"status": "ok"}


def test_a_client_that_leaves_frees_its_slot(worker):
    before = stats(worker)["cancelled"]
    body = {"model": "scripted", "prompt": "be slow"}
    with httpx.stream("POST", worker.url + "/worker_generate_stream", json=body, headers=SECRET) as reply:
        pieces = reply.iter_raw()
        next(pieces)
        assert stats(worker)["running"] == 1
    wait_until(lambda: stats(worker)["cancelled"] == before + 1, 5)
    assert stats(worker)["running"] == 0


def test_an_answer_that_takes_too_long_is_a_timeout():
    with Process(MODULE, "--pause", "0.1", "--timeout", "0.5", env=ENV) as slow:
        chunks = ask(slow.wait(), "be slow")
        assert chunks[-1]["error_type"] == "timeout"
        wait_until(lambda: stats(slow)["running"] == 0, 5)


def test_sigterm_lets_running_answers_finish_and_leaves_the_controller():
    with Process("llava.serve.controller", env=ENV) as controller:
        controller.wait()
        with Process(MODULE, "--controller", controller.url, "--pause", "0.1", env=ENV) as worker:
            worker.wait()
            wait_until(lambda: models(controller) == ["scripted"], 10)
            found = []
            thread = threading.Thread(target=lambda: found.extend(ask(worker, "1 2 3 4 5 6 7 8 9 10 11 12")))
            thread.start()
            wait_until(lambda: stats(worker)["running"] == 1, 5)
            assert worker.stop() in (0, -15)
            thread.join()
            assert models(controller) == []
    assert found[-1]["finish_reason"] == "stop"


def test_a_worker_finds_a_controller_that_starts_later_or_anew(monkeypatch):
    with Process("llava.serve.controller", env=ENV) as first:
        port = first.port
    with Process(MODULE, "--controller", f"http://127.0.0.1:{port}", env=ENV) as worker:
        worker.wait()
        time.sleep(0.3)
        with Process("llava.serve.controller", port=port, env=ENV) as controller:
            controller.wait()
            wait_until(lambda: models(controller) == ["scripted"], 10)


def models(controller):
    return httpx.post(controller.url + "/list_models", headers=SECRET).json()["models"]


def test_ctrl_c_stops_controller_and_worker_without_a_complaint():
    """As a shell sends it to both: the controller has gone before the worker can take its leave."""
    with Process("llava.serve.controller", env=ENV) as controller:
        controller.wait()
        with Process(MODULE, "--controller", controller.url, env=ENV) as worker:
            worker.wait()
            wait_until(lambda: models(controller) == ["scripted"], 10)
            controller.kill()
            worker.process.send_signal(signal.SIGINT)
            assert worker.process.wait(20) in (0, 130, -signal.SIGINT)
            assert "registered with" in worker.log.read_text()
            assert "WARNING" not in worker.log.read_text()


def test_a_heartbeat_outlives_answers_that_are_no_objects(caplog, monkeypatch):
    """Another server may be on the controller's port, or a proxy before it."""
    monkeypatch.setattr("llava.serve.worker.heartbeat.WORKER_HEART_BEAT_INTERVAL", 0.01)
    monkeypatch.setattr("llava.serve.worker.heartbeat.RETRY_SECONDS", 0.01)
    answers = iter(["{}", "[]", '"no"', "null", "[" * 200_000, "{}", '{"exist": true}'])
    asked, done = [], asyncio.Event()

    async def answer(request):
        asked.append(request.path)
        if len(asked) == 8:
            done.set()
        return web.Response(text=next(answers, '{"exist": true}'), content_type="application/json")

    async def go():
        app = web.Application()
        app.router.add_post("/{path}", answer)
        server = TestServer(app)
        await server.start_server()
        status = {"model_names": ["m"], "speed": 1, "queue_length": 0}
        member = Membership(str(server.make_url("/")), "http://127.0.0.1:1", lambda: status, None)
        member.start()
        await asyncio.wait_for(done.wait(), 30)
        known = member.task is not None and not member.task.done()
        await member.leave()
        await member.close()
        await server.close()
        return known

    assert asyncio.run(go())
    beat, registered = "/receive_heart_beat", "/register_worker"
    # It registers, one heartbeat fails, it registers anew until that succeeds, and beats.
    assert asked[:8] == [registered, beat, registered, registered, registered, registered, beat, beat]
    assert caplog.text.count("it is no controller: []") == 1
    assert caplog.text.count("WARNING") == 1


def test_a_heartbeat_outlives_a_status_that_fails(caplog, monkeypatch):
    monkeypatch.setattr("llava.serve.worker.heartbeat.WORKER_HEART_BEAT_INTERVAL", 0.01)
    monkeypatch.setattr("llava.serve.worker.heartbeat.RETRY_SECONDS", 0.01)
    asked, told, done = [], [], asyncio.Event()

    def status():
        told.append(len(told))
        if len(told) in (1, 3):  # at the registration, and at a heartbeat
            raise RuntimeError("no numbers now")
        return {"model_names": ["m"], "speed": 1, "queue_length": 0}

    async def answer(request):
        asked.append(request.path)
        if len(asked) == 3:
            done.set()
        return web.json_response({"exist": True})

    async def go():
        app = web.Application()
        app.router.add_post("/{path}", answer)
        server = TestServer(app)
        await server.start_server()
        member = Membership(str(server.make_url("/")), "http://127.0.0.1:1", status, None)
        member.start()
        await asyncio.wait_for(done.wait(), 30)
        await member.leave()
        await member.close()
        await server.close()

    asyncio.run(go())
    assert asked[:3] == ["/register_worker", "/register_worker", "/receive_heart_beat"]
    assert caplog.text.count("RuntimeError: no numbers now") == 2


def test_workers_are_asked_how_they_are_at_the_same_time():
    async def go():
        together = asyncio.Barrier(3)

        async def list_workers(request):
            return web.json_response({"workers": [{"address": f"{server.make_url('')}/{n}"} for n in range(3)]})

        async def status(request):
            await together.wait()
            return web.json_response({"model_names": [f"m{request.match_info['n']}"], "queue_length": 0})

        app = web.Application()
        app.router.add_post("/list_workers", list_workers)
        app.router.add_post("/{n}/worker_get_status", status)
        server = TestServer(app)
        await server.start_server()
        client = ServingClient(str(server.make_url("/")), None)
        found = await client.worker_stats()
        await client.close()
        await server.close()
        return found

    found = asyncio.run(asyncio.wait_for(go(), 30))
    assert [worker["model_names"] for worker in found] == [["m0"], ["m1"], ["m2"]]
