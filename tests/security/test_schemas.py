"""JSON schemas that are small and take any time and memory to compile: refused, while everybody else is served."""

import concurrent.futures
import contextlib
import json
import threading
import time

import httpx
import psutil
import pytest

from llava.errors import LlavaError
from llava.serve.decoding.pool import Waiting, _waiting
from llava.serve.decoding.schemas import SchemaPool
from llava.serve.protocol import ServeError
from tests.serve.processes import TINY_ENV, wait_until
from tests.tiny_serving import checkpoint, tiny_serving

__all__ = ["checkpoint", "tiny_serving"]
pytest.importorskip("llguidance")
PATIENCE = 60.0
"""Seconds; unbounded, these schemas take minutes to hours."""


def patterns(first: int) -> dict:
    """Their intersection has about as many states as numbers of 40 bits."""
    return {"allOf": [{"type": "string", "pattern": f"[ab]*a[ab]{{{i}}}b"} for i in range(first, 40)]}


HOSTILE = {
    "intersection": patterns(3),
    "letters": {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwxyz"]},
    "alternatives": {
        "allOf": [
            {"type": "string", "pattern": "|".join(f"(.*x{i}.*)" for i in range(first, first + 20))}
            for first in range(20)
        ]
    },
    "multiples": {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (7919, 7907, 7901)]},
}
PLAIN = {"type": "object", "properties": {"finding": {"type": "string"}, "sites": {"enum": ["left", "right"]}}}


def ask(url, schema=None, timeout=PATIENCE, **more):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8} | more
    if schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return httpx.post(url + "/v1/chat/completions", json=body, timeout=timeout)


@pytest.fixture(scope="module")
def pool():
    pool = SchemaPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_and_the_next_one_is_read(pool, name):
    began = time.monotonic()
    with pytest.raises(LlavaError, match=r"^json_schema: [^\n]+$"):
        pool.check(json.dumps(HOSTILE[name]))
    assert time.monotonic() - began < PATIENCE
    pool.check(json.dumps(PLAIN))


def test_time_is_bounded_where_memory_is_not():
    pool = SchemaPool(1, seconds=1.0, memory=2 << 30)
    try:
        with pytest.raises(LlavaError, match="too long or too much memory"):
            pool.check(json.dumps(HOSTILE["letters"]))
    finally:
        pool.close()


def test_who_leaves_frees_the_process():
    pool = SchemaPool(1, seconds=600.0, memory=8 << 30)
    waiting = Waiting(time.monotonic() + 600)
    token = _waiting.set(waiting)
    threading.Timer(1.0, waiting.gone.set).start()
    try:
        with pytest.raises(ServeError, match="Cancelled"):
            pool.check(json.dumps(HOSTILE["letters"]))
        assert pool.pool.killed == 1
    finally:
        _waiting.reset(token)
        pool.close()


def test_a_worker_serves_beside_hostile_schemas(tiny_serving):
    _, worker, api = tiny_serving
    assert ask(api.url, PLAIN).status_code == 200  # what is loaded once is loaded
    process = psutil.Process(worker.process.pid)
    before = process.memory_info().rss
    with concurrent.futures.ThreadPoolExecutor(40) as threads:
        hostile = [threads.submit(ask, api.url, patterns(3 + number % 8), 600) for number in range(8)]
        choices = threads.submit(ask, api.url, HOSTILE["letters"], 600, n=4)
        text = [threads.submit(ask, api.url) for _ in range(4)]
        assert {work.result().status_code for work in text} == {200}
        for work in [*hostile, choices]:
            reply = work.result()
            assert reply.status_code == 400
            assert reply.json()["error"]["type"] == "bad_request"
            assert reply.json()["error"]["message"].startswith("json_schema: ")
    assert ask(api.url, PLAIN | {"title": "another"}).status_code == 200
    assert process.memory_info().rss - before < 300 << 20


def test_clients_that_leave_take_nothing_with_them(tiny_serving):
    _, worker, api = tiny_serving
    for prime in (99991, 99989, 99971):  # a second or more for each
        with contextlib.suppress(httpx.TimeoutException):
            ask(api.url, {"type": "integer", "multipleOf": prime}, timeout=0.3)
    assert ask(api.url).status_code == 200

    def is_idle():
        children = psutil.Process(worker.process.pid).children(recursive=True)
        try:
            return sum(child.cpu_percent(0.2) for child in children) < 50
        except psutil.NoSuchProcess:  # one that was given up has just been ended
            return False

    wait_until(is_idle, PATIENCE)
    assert ask(api.url, PLAIN).status_code == 200
    assert "never retrieved" not in worker.log.read_text()


def test_a_look_at_the_attention_compiles_nothing(tiny_serving):
    asked = {"model": "tiny", "prompt": "hi", "token_ids": [5, 6], "json_schema": patterns(5) | {"title": "a look"}}
    url = tiny_serving[1].url + "/worker_attention_map"
    reply = httpx.post(url, json=asked, headers={"x-llava-secret": TINY_ENV["LLAVA_SERVE_SECRET"]}, timeout=PATIENCE)
    assert reply.status_code == 200 and len(reply.json()["tokens"]) == 2
