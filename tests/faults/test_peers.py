"""Workers that answer garbage, slowly or not at all: every question gets a typed answer, and the servers go on."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llava.serve.protocol import ErrorType
from tests.faults.servers import ENV, KEY
from tests.serve.processes import Process, wait_until

SECRET = {"x-llava-secret": ENV["LLAVA_SERVE_SECRET"]}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


ANSWERS = {
    "no HTTP": b"\x00\x01garbage\r\n\r\n",
    "nothing": b"",
    "no JSON": CHUNKED + chunk(b"garbage\0") + chunk(b""),
    "not an object": CHUNKED + chunk(b"[1, 2]\0") + chunk(b""),
    "no fields": CHUNKED + chunk(b"{}\0") + chunk(b""),
    "text that is a number": CHUNKED + chunk(b'{"text": 3, "error_code": 0}\0') + chunk(b""),
    "no end mark": CHUNKED + chunk(b'{"text": "a", "error_code": 0}') + chunk(b""),
    "half a chunk": CHUNKED + b"ffff\r\nabc",
    "not UTF-8": CHUNKED + chunk(b'{"text": "\xff\xfe", "error_code": 0}\0') + chunk(b""),
    "a code without words": CHUNKED + chunk(b'{"error_code": 7}\0') + chunk(b""),
    "another status": b"HTTP/1.1 418 Teapot\r\ncontent-length: 0\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n",
    "no usage": CHUNKED + chunk(b'{"text": "a", "error_code": 0, "finish_reason": "stop"}\0') + chunk(b""),
    "never an end": CHUNKED + chunk(b'{"text": "a", "error_code": 0}\0') + chunk(b""),
}


class RawWorker:
    """Says of itself what a worker has to say, and answers questions with given bytes; then the line is closed."""

    def __init__(self):
        self.answer, self.pause = b"", 0.0  # seconds between two bytes
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._reply, args=(connection,), daemon=True).start()

    def _reply(self, connection):
        with connection, contextlib.suppress(BrokenPipeError):  # who has heard the last chunk may leave
            request = connection.recv(1 << 20)
            answer, pause = self.answer, self.pause
            if b"/worker_get_status" in request.split(b"\r\n")[0]:
                pause = 0.0
                status = json.dumps({"model_names": ["m"], "speed": 1, "queue_length": 0}).encode()
                answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\n"
                answer += f"content-length: {len(status)}\r\n\r\n".encode() + status
            for piece in map(bytes, zip(answer)) if pause else (answer,):
                connection.sendall(piece)
                time.sleep(pause)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1 << 20)  # or closing would throw away what was sent


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """(API, controller, worker, folder of logs)"""
    logs = tmp_path_factory.mktemp("logs")
    worker = RawWorker()
    with Process("llava.serve.controller", env=ENV, log=logs / "controller") as controller:
        controller.wait()
        words = ("--controller", controller.url)
        with Process("llava.serve.openai_api_server", *words, env=ENV, log=logs / "api") as api:
            api.wait()
            yield api, controller, worker, logs
    worker.listener.close()


def register(controller, worker):
    body = {"worker_name": worker.url, "check_heart_beat": False}
    assert httpx.post(controller.url + "/register_worker", json=body, headers=SECRET).status_code == 200


def ask(api, stream, model="m"):
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "stream": stream}
    return httpx.post(api.url + "/v1/chat/completions", json=body, headers=KEY, timeout=30)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_worker_that_answers_garbage(serving, name, stream):
    api, controller, worker, logs = serving
    register(controller, worker)
    worker.answer = ANSWERS[name]
    before = {log: len(log.read_text()) for log in (logs / "api", logs / "controller")}
    reply = ask(api, stream)
    if reply.status_code == 200:
        assert stream
        last = [event for event in reply.text.split("\n\n") if event][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        error = reply.json()["error"]
    assert error["type"] in {kind.value for kind in (ErrorType.WORKER_LOST, ErrorType.NO_WORKER, ErrorType.INTERNAL)}
    assert "127.0.0.1" not in error["message"]
    assert httpx.get(api.url + "/health").status_code == 200
    for log, length in before.items():
        assert "Traceback" not in log.read_text()[length:]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_slow_worker_is_waited_for(serving, stream):
    """Its words come byte by byte, each chunk in many pieces; others are answered meanwhile."""
    api, controller, worker, _ = serving
    register(controller, worker)
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    last = {"text": "sörry, slow", "error_code": 0, "finish_reason": "stop", "usage": usage}
    said = [json.dumps(each, ensure_ascii=False).encode() + b"\0" for each in ({"text": "sö", "error_code": 0}, last)]
    worker.answer, worker.pause = CHUNKED + b"".join(map(chunk, [*said, b""])), 0.005
    try:
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(ask, api, stream)
            assert httpx.get(api.url + "/v1/models", headers=KEY).status_code == 200
            assert not reply.done()
        text = reply.result().text
    finally:
        worker.pause = 0.0
    if stream:
        events = [
            json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event.startswith("data: {")
        ]
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "sörry, slow"
    else:
        assert json.loads(text)["choices"][0]["message"]["content"] == "sörry, slow"


def test_a_silent_worker_stops_nobody_else(serving):
    """A worker that takes connections and never answers: others are asked meanwhile, and who leaves is let go."""
    api, controller, worker, _ = serving
    worker.answer = b""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"http://127.0.0.1:{silent.getsockname()[1]}"
        status = {"model_names": ["silent"], "speed": 1, "queue_length": 0}
        body = {"worker_name": name, "check_heart_beat": False, "worker_status": status}
        assert httpx.post(controller.url + "/register_worker", json=body, headers=SECRET).status_code == 200
        question = {"model": "silent", "messages": [{"role": "user", "content": "x"}]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(api.url + "/v1/chat/completions", json=question, headers=KEY, timeout=1.0)
        models = httpx.get(api.url + "/v1/models", headers=KEY).json()["data"]
        assert "silent" in {entry["id"] for entry in models}
        # Asked how it is, it is dropped: it doesn't say.
        left = httpx.post(controller.url + "/refresh_all_workers", headers=SECRET, timeout=30).json()["models"]
        assert "silent" not in left


def test_a_controller_that_starts_again_knows_its_workers(tmp_path):
    """Workers register anew by themselves, once their next heartbeat isn't known; clients notice nothing of it."""
    controller = Process("llava.serve.controller", env=ENV, log=tmp_path / "controller").wait()
    words = ("--controller", controller.url)
    with (
        Process("tests.serve.scripted_worker", *words, env=ENV, log=tmp_path / "worker") as worker,
        Process("llava.serve.openai_api_server", *words, env=ENV, log=tmp_path / "api") as api,
    ):
        worker.wait()
        api.wait()
        models = lambda: httpx.post(controller.url + "/list_models", headers=SECRET).json()["models"]  # noqa: E731
        wait_until(lambda: models() == ["scripted"], 60)

        def assert_served():
            assert ask(api, False, "scripted").status_code == ask(api, True, "scripted").status_code == 200
            known = httpx.get(api.url + "/v1/models", headers=KEY).json()["data"]
            assert [entry["id"] for entry in known] == ["scripted"]
            assert ask(api, False, "another").json()["error"]["type"] == "model_not_found"

        assert_served()
        controller.kill()
        assert_served()
        with Process("llava.serve.controller", port=controller.port, env=ENV, log=tmp_path / "controller") as again:
            again.wait()
            assert models() == []
            assert_served()
            wait_until(lambda: models() == ["scripted"], 60)
            assert_served()
            # One that leaves in order isn't asked any more.
            worker.stop()
            assert ask(api, False, "scripted").status_code in (502, 503)
    assert "Traceback" not in (tmp_path / "worker").read_text()
