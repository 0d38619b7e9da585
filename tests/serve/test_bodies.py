"""Bodies that aim at the reader: every server refuses them in words, stays up, and doesn't grow."""

import asyncio
import contextlib
import json
from pathlib import Path

import httpx
import pytest

from llava.serve.api.choices import MOST_UNREAD, Choices
from llava.serve.api.metrics import Metrics
from llava.serve.protocol import ErrorType, ServeError, split_chunks
from llava.serve.secret import HEADER
from llava.serve.transport.bodies import MOST_VALUES, parse_json, written
from llava.serve.transport.middleware import RequestMiddleware
from llava.serve.worker.answering import Mailbox
from tests.serve.processes import Process, wait_until

ENV = {"LLAVA_SERVE_SECRET": "s3cret"}
SECRET = {HEADER: "s3cret"}
MANY = b'{"role":"user","content":"x"}'
BROKEN = {
    "no JSON": (b"{", "not JSON"),
    "no object": (b"[1]", "not a JSON object"),
    "no UTF-8": (b'{"model": "\xff"}', "not JSON"),
    "another encoding": ('{"model": "m"}'.encode("utf-16"), "not JSON"),
    "deep": (b'{"model": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "not JSON"),
    "a million messages": (b'{"model": "m", "messages": [' + b",".join([MANY] * 10**6) + b"]}", "values"),
    "not a number": (b'{"model": "m", "queue_length": NaN}', "not JSON"),
    "endless": (b'{"model": "m", "queue_length": -Infinity}', "not JSON"),
    "half a character": (rb'{"model": "\ud800", "worker_name": "\udfff"}', "hex escape at line 1 column"),
    "half a character deep inside": (rb'{"model": "m", "messages": [{"content": "\udc00"}]}', "in hex escape"),
    "half a character as a name": (rb'{"model": "m", "x": {"\ud800": 1}}', "hex escape at line 1 column"),
    "the wrong type": (b'{"model": ["m"], "worker_name": ["m"]}', "Input should be a valid string"),
}
PATHS = {
    "controller": ("/worker_generate_stream", "/get_worker_address", "/register_worker", "/receive_heart_beat"),
    "worker": ("/worker_generate_stream", "/worker_attention_map", "/worker_seen_images"),
    "api": ("/v1/chat/completions",),
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Controller, scripted worker and API by name."""
    logs = tmp_path_factory.mktemp("logs")
    with Process("llava.serve.controller", env=ENV, log=logs / "controller") as controller:
        controller.wait()
        words = ("--controller", controller.url)
        with (
            Process("tests.serve.scripted_worker", *words, env=ENV, log=logs / "worker") as worker,
            Process("llava.serve.openai_api_server", *words, env=ENV, log=logs / "api") as api,
        ):
            worker.wait()
            api.wait()
            wait_until(lambda: httpx.get(api.url + "/ready").status_code == 200, 30)
            yield {"controller": controller, "worker": worker, "api": api}


def said(reply):
    """(HTTP's status, the type of the error, its words), of a reply or of a stream's last chunk."""
    if reply.status_code == 200:
        chunk = split_chunks(reply.content)[0][-1]
        return 400, chunk["error_type"], chunk["text"]
    error = reply.json()["error"]
    return reply.status_code, error["type"], error["message"]


def peak_memory(process):
    """Bytes."""
    lines = Path(f"/proc/{process.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


@pytest.mark.parametrize("name", PATHS)
def test_each_server_refuses_them_and_lives(servers, name):
    server = servers[name]
    before, log = peak_memory(server), server.log.read_text()
    for path in PATHS[name]:
        for case, (content, words) in BROKEN.items():
            reply = httpx.post(server.url + path, content=content, headers=SECRET, timeout=60)
            status, kind, message = said(reply)
            assert (status, kind) == (400, "bad_request"), (path, case, message)
            # Where a field isn't read at all, another one is what is wrong.
            assert words in message or case == "the wrong type", (path, case, message)
    assert httpx.get(server.url + "/health", timeout=5).status_code == 200
    assert peak_memory(server) - before < 300 << 20, "29 MB became gigabytes"
    assert "Traceback" not in server.log.read_text()[len(log) :]


def test_large_bodies_of_few_values_are_read(servers):
    """A conversation with images is large too; its texts aren't."""
    url = "data:image/png;base64," + "A" * (20 << 20)
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "large"}]
    body = {"model": "scripted", "messages": [{"role": "user", "content": parts}]}
    reply = httpx.post(servers["api"].url + "/v1/chat/completions", json=body, timeout=60)
    assert reply.json()["choices"][0]["message"]["content"] == "echo: <image> large "


def test_texts_beyond_all_contexts_are_refused_by_api_and_worker(servers):
    body = {"model": "scripted", "messages": [{"role": "user", "content": "x" * 50_000}] * 1000}
    for name, path in (("api", "/v1/chat/completions"), ("worker", "/worker_generate_stream")):
        status, kind, message = said(httpx.post(servers[name].url + path, json=body, headers=SECRET, timeout=60))
        assert (status, kind) == (400, "bad_request") and "50000000 characters" in message


@pytest.mark.parametrize(
    "body",
    [
        {"worker_name": "http://127.0.0.1:9", "worker_status": {"model_names": "m"}},
        {"worker_name": "http://127.0.0.1:9", "worker_status": {"model_names": ["a\nb"]}},
        {"worker_name": "http://127.0.0.1:9", "worker_status": {"model_names": ["m"], "speed": -1}},
        {"worker_name": "http://127.0.0.1:9", "worker_status": {"model_names": ["m"], "queue_length": 1e300}},
        {"worker_name": "no address", "worker_status": {"model_names": ["m"]}},
        {},
    ],
)
def test_only_a_worker_registers(servers, body):
    reply = httpx.post(servers["controller"].url + "/register_worker", json=body, headers=SECRET)
    assert said(reply)[:2] == (400, "bad_request")


def test_whole_characters_as_escapes_are_fine():
    assert parse_json(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}
    assert parse_json(b"") == {}
    text = "," * (MOST_VALUES - 2)
    assert parse_json(json.dumps({"text": text}).encode()) == {"text": text}
    with pytest.raises(ServeError, match="values"):
        parse_json(json.dumps({"text": text + ",,"}).encode())


@pytest.mark.parametrize("text", ["x", '"\\\n\x00é😀'], ids=["plain", "escaped"])
def test_a_body_is_written_in_parts_as_it_would_be_in_one(text):
    """A short one is one part, so that its length is known."""
    small = {"model": "m", "messages": [{"content": text, 'a "name"': []}], "more": {}, "seed": None, "rate": 0.5}
    assert json.loads(written(small)) == small
    assert json.loads(written({"logit_bias": {300: 1.5}})) == {"logit_bias": {"300": 1.5}}

    async def gather(parts):
        return [part async for part in parts]

    large = small | {"images": [text * 700_000, text], "last": text * 300_000}
    parts = asyncio.run(gather(written(large)))
    assert json.loads(b"".join(parts)) == large
    assert len(parts) > 3 and max(map(len, parts)) < 8 << 20


def test_a_cancel_is_never_swallowed():
    """Also one that comes in the turn of the loop in which what is waited for is done: wait_for loses it there."""

    async def go():
        mailbox = Mailbox()

        async def answering():
            await mailbox.pause(60)
            await asyncio.sleep(60)

        task = asyncio.create_task(answering())
        await asyncio.sleep(0)
        mailbox._wake(is_last=True)
        await asyncio.sleep(0)  # the waiter is done; what waits for it goes on in the next turn
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=10)
        assert done and task.cancelled()

    asyncio.run(go())


@pytest.mark.parametrize("length", [b"\xb2", b"9" * 5000, b"-1"])
def test_a_length_that_is_no_number_is_refused(length):
    """Whatever server stands before it: Python takes "²" for a digit, and no number of 5000 of them."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [(b"content-length", length)]}
    asyncio.run(RequestMiddleware(None, lambda headers: None)(scope, receive, send))
    assert sent[0]["status"] == 413


def test_workers_wait_for_a_client_that_does_not_read():
    """Each step of an answer holds its text so far."""

    class Talkative:
        said = 0

        async def generate(self, body):
            for number in range(1, 1001):
                self.said = number
                yield {"text": "word " * number, "finish_reason": "stop" if number == 1000 else None, "usage": {}}

    async def read_slowly():
        client = Talkative()
        async with contextlib.aclosing(Choices(client, [{}], Metrics()).steps()) as steps:
            await anext(steps)
            for _ in range(2000):
                await asyncio.sleep(0)
            unread = client.said
            rest = [step.delta async for step in steps]
        return unread, rest

    unread, rest = asyncio.run(read_slowly())
    assert unread <= MOST_UNREAD + 2 and len(rest) == 999 and rest[-1] == "word "


def test_an_answer_that_fails_is_raised_behind_what_was_said():
    class Failing:
        async def generate(self, body):
            for number in range(1, 101):
                yield {"text": "word " * number}
            raise ServeError(ErrorType.WORKER_LOST)

    async def read():
        said = []
        with pytest.raises(ServeError, match="stopped while it was answering"):
            async for step in Choices(Failing(), [{}], Metrics()).steps():
                said.append(step.delta)
        return said

    assert len(asyncio.run(read())) == 100
