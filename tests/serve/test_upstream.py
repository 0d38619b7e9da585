"""A worker in front of an OpenAI-compatible server, over real sockets: our own API is the server behind it."""

import dataclasses
import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from llava.serve.job import Message, read_job
from llava.serve.protocol import ErrorType, ServeError, split_chunks
from llava.serve.secret import HEADER
from llava.serve.worker import upstream_backend
from llava.serve.worker.upstream_backend import UpstreamBackend, to_request
from tests.serve.processes import Process, wait_until
from tests.serve.test_openai_api import data_url, get

KEY = "key-for-tests"
ENV = {"LLAVA_SERVE_SECRET": "s3cret", "LLAVA_API_KEYS": KEY, "LLAVA_UPSTREAM_API_KEY": KEY}
SECRET = {HEADER: "s3cret"}
FLAGS = ("--no-register", "--api-model", "scripted", "--model-name", "behind")


@pytest.fixture(scope="module")
def upstream():
    """(API, the worker that answers behind it)."""
    with Process("llava.serve.controller", env=ENV) as controller:
        controller.wait()
        with (
            Process(
                "tests.serve.scripted_worker", "--controller", controller.url, "--pause", "0.02", env=ENV
            ) as worker,
            Process("llava.serve.openai_api_server", "--controller", controller.url, env=ENV) as api,
        ):
            worker.wait()
            api.wait()
            wait_until(lambda: get(api, "/ready").status_code == 200, 60)
            yield api, worker


def test_it_cant_tell_where_the_model_looked(worker):
    body = {"model": "behind", "messages": [{"role": "user", "content": "Hi"}], "token_ids": [1]}
    reply = httpx.post(worker.url + "/worker_attention_map", json=body, headers=SECRET, timeout=10)
    assert reply.status_code == 400 and "doesn't tell" in reply.json()["error"]["message"]
    del body["token_ids"]
    reply = httpx.post(worker.url + "/worker_seen_images", json=body, headers=SECRET, timeout=10)
    assert reply.status_code == 400 and "doesn't tell what the model sees" in reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def worker(upstream, tmp_path_factory):
    log = tmp_path_factory.mktemp("worker") / "log"
    words = (*FLAGS, "--api-base", upstream[0].url + "/v1", "--limit-model-concurrency", "4", "--max-queue", "2")
    with Process("llava.serve.model_worker", *words, env=ENV, log=log) as process:
        yield process.wait()


def ask(worker, text, *images, **more):
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images] + [{"type": "text", "text": text}]
    body = {"model": "behind", "messages": [{"role": "user", "content": content}], **more}
    reply = httpx.post(worker.url + "/worker_generate_stream", json=body, headers=SECRET, timeout=60)
    assert reply.status_code == 200
    return split_chunks(reply.content)[0]


def queue_length(process):
    return httpx.post(process.url + "/worker_get_status", headers=SECRET).json()["queue_length"]


def test_an_answer_comes_through_in_pieces_with_its_account(worker):
    chunks = ask(worker, "one two three four five six", data_url(), logprobs=1)
    assert chunks[-1]["text"] == "echo: <image> one two three four five six ", "the image in its place"
    assert chunks[-1]["finish_reason"] == "stop" and len(chunks) >= 2
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert ask(worker, "one two three", max_new_tokens=2)[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("word", "error_type"),
    [("context", ErrorType.CONTEXT_TOO_LONG), ("full", ErrorType.QUEUE_FULL), ("oom", ErrorType.INTERNAL)],
)
def test_refusals_keep_their_kind(worker, word, error_type):
    assert ask(worker, f"please {word}")[-1]["error_type"] == error_type.value


def test_a_broken_image_and_a_ready_prompt_are_refused_here(worker):
    broken = "data:image/png;base64,aGVsbG8="
    assert ask(worker, "What?", broken)[-1]["error_type"] == ErrorType.BAD_IMAGE.value
    body = {"model": "behind", "prompt": "USER: hi ASSISTANT:"}
    reply = httpx.post(worker.url + "/worker_generate_stream", json=body, headers=SECRET, timeout=60)
    chunk = split_chunks(reply.content)[0][-1]
    assert chunk["error_type"] == ErrorType.BAD_REQUEST.value and "messages" in chunk["text"]


def test_a_client_that_leaves_is_gone_from_the_server_behind_too(upstream, worker):
    body = {"model": "behind", "messages": [{"role": "user", "content": "now hold"}]}
    with httpx.stream("POST", worker.url + "/worker_generate_stream", json=body, headers=SECRET, timeout=60) as reply:
        pieces = reply.iter_bytes()  # kept: dropping it would close the stream
        next(pieces)
        wait_until(lambda: queue_length(upstream[1]) == 1, 20)
    wait_until(lambda: queue_length(worker) == 0, 20)
    wait_until(lambda: queue_length(upstream[1]) == 0, 20)


def test_nobody_there_and_a_wrong_key(upstream, tmp_path):
    for base, key, error_type in (
        ("http://127.0.0.1:9/v1", KEY, ErrorType.WORKER_LOST),
        (upstream[0].url + "/v1", "wrong-key-of-ours", ErrorType.INTERNAL),
    ):
        env = ENV | {"LLAVA_UPSTREAM_API_KEY": key}
        with Process("llava.serve.model_worker", *FLAGS, "--api-base", base, env=env, log=tmp_path / "log") as process:
            assert ask(process.wait(), "hello")[-1]["error_type"] == error_type.value
        assert key not in (tmp_path / "log").read_text()


def test_a_backend_that_closes_ends_every_request():
    """The server behind it takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        backend = UpstreamBackend(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "m", concurrency=1)
        job = read_job({"model": "m", "messages": [{"role": "user", "content": "Hi"}]})
        news: queue.Queue = queue.Queue()
        for _ in range(2):  # one at the server, one that waits
            backend.submit(job, news.put)
        wait_until(lambda: backend.stats()["running"] == 1, 30)
        backend.close()
        for _ in range(2):
            assert news.get(timeout=30).error.error_type == ErrorType.CANCELLED
        with pytest.raises(ServeError) as refused:
            backend.submit(job, news.put)
        assert refused.value.error_type == ErrorType.WORKER_LOST and backend.stats()["queue_length"] == 0


def test_a_chunk_of_another_form_is_an_error_not_a_cancel(caplog):
    class Strange(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            self.wfile.write(b'data: {"id": "1", "choices": null}\n\ndata: [DONE]\n\n')

    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever).start()
        backend = UpstreamBackend(f"http://127.0.0.1:{server.server_port}/v1", "m")
        pieces = queue.Queue()
        backend.submit(read_job({"messages": [{"role": "user", "content": "x"}]}), pieces.put)
        assert pieces.get(timeout=30).error.error_type is ErrorType.INTERNAL
        assert "the server that runs the model failed" in caplog.text
        backend.close()
        server.shutdown()


def test_images_go_on_as_png_in_their_places():
    text = "<image>\nbefore\n<image>\nafter"
    job = read_job({"messages": [{"role": "user", "content": "x"}], "stop": ["###"], "seed": 3, "top_k": 5})
    message = Message("user", text, (data_url(), data_url()))
    request, size = to_request(dataclasses.replace(job, messages=(message,)), "m")
    parts = request["messages"][0]["content"]
    assert size == sum(len(part["image_url"]["url"]) for part in parts[::2])
    assert [part.get("text") for part in parts] == [None, "before", None, "after"]
    assert all(part["image_url"]["url"].startswith("data:image/png;base64,iVBOR") for part in parts[::2])
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (0.0, 1.0, 256)
    assert request["extra_body"] == {"stop": ["###"], "seed": 3, "top_k": 5}, "nothing that is at its default"


def test_images_that_grow_too_large_as_png_are_refused(monkeypatch):
    """A JPEG may become twenty times as long."""
    monkeypatch.setattr(upstream_backend, "MOST_SENT", 3 * len(data_url()))
    job = read_job({"messages": [{"role": "user", "content": "x"}]})

    def request(count):
        message = Message("user", "<image>\n" * count, (data_url(),) * count)
        return to_request(dataclasses.replace(job, messages=(message, message)), "m")[0]

    assert len(request(1)["messages"]) == 2
    with pytest.raises(ServeError, match="as PNG, as they are sent on") as caught:
        request(2)
    assert caught.value.error_type is ErrorType.TOO_LARGE


def test_images_of_all_requests_have_a_total(monkeypatch):
    """Those that wait for a silent server too; what is given up gives its place back."""
    monkeypatch.setattr(upstream_backend, "MOST_HELD", 2 * len(data_url()) + 10)
    pieces = queue.Queue()
    content = [{"type": "image_url", "image_url": {"url": data_url()}}, {"type": "text", "text": "?"}]
    job = read_job({"messages": [{"role": "user", "content": content}]})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        backend = UpstreamBackend(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "m")
        cancel, _ = backend.submit(job, pieces.put), backend.submit(job, pieces.put)
        with pytest.raises(ServeError) as caught:
            backend.submit(job, pieces.put)
        assert caught.value.error_type is ErrorType.QUEUE_FULL
        cancel()
        assert pieces.get(timeout=30).error.error_type is ErrorType.CANCELLED
        backend.submit(job, pieces.put)()
        backend.close()


def test_either_a_checkpoint_or_a_server():
    from llava.errors import LlavaError
    from llava.serve.model_worker import main

    with pytest.raises(LlavaError, match=r"--model-path \(a checkpoint\), or --api-base and --api-model"):
        main(["--api-base", "http://127.0.0.1:9/v1"])


def test_limits_of_time(upstream):
    """One for a whole answer, one between two chunks, one for what still runs when the worker is stopped."""
    words = (*FLAGS, "--api-base", upstream[0].url + "/v1")
    with Process("llava.serve.model_worker", *words, "--request-timeout", "0.5", env=ENV) as hasty:
        assert ask(hasty.wait(), "be slow")[-1]["error_type"] == "timeout"
    with Process(
        "llava.serve.model_worker", *words, "--stream-interval", "100", "--drain-seconds", "0", env=ENV
    ) as lazy:
        lazy.wait()
        assert len(ask(lazy, "1 2 3 4 5 6 7 8 9 10 11 12")) <= 3, "100 of the old flag's tokens are two seconds"
        with pytest.raises(httpx.TransportError), ThreadPoolExecutor(1) as pool:
            running = pool.submit(ask, lazy, "please hold")
            wait_until(lambda: queue_length(lazy) == 1, 10)
            lazy.stop(20)
            running.result()
