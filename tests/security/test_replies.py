"""Replies of many megabytes hold up nobody else who asks the API or the worker."""

import json
import time

import httpx
import pytest

from llava.serve.api.encoding import encoded, is_long
from llava.serve.protocol import MOST_ENTRIES
from tests.security.conftest import SECRET
from tests.security.talking import serving
from tests.serve.health import HealthWatch

TOKENS = 900
CHAT = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20, "max_tokens": TOKENS}
LARGE = {
    "chat/completions": CHAT | {"n": 16},
    "completions": {"prompt": "x", "n": 16, "logprobs": 20, "max_tokens": TOKENS},
    "responses": {"input": "x", "top_logprobs": 20, "max_output_tokens": 8 * TOKENS},
}


@pytest.fixture(scope="module")
def servers():
    """(API, worker)."""
    with serving() as started:
        yield started["api"], started["worker"]


def post(api, path, body):
    return httpx.post(f"{api.url}/v1/{path}", json={"model": "talking"} | body, timeout=600)


def events_of(reply):
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    return list(map(json.loads, lines))


def count_tokens(path, reply):
    """In the logprobs of all choices."""
    if path == "responses":
        return len(reply["output"][0]["content"][0]["logprobs"])
    name = "content" if path == "chat/completions" else "tokens"
    return sum(len(choice["logprobs"][name]) for choice in reply["choices"])


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("path", LARGE)
def test_a_large_reply_leaves_the_loop_to_others(servers, path, is_streamed):
    api, worker = servers
    with HealthWatch({"api": api.url, "worker": worker.url}) as health:
        began = time.monotonic()
        reply = post(api, path, LARGE[path] | {"stream": is_streamed})
        seconds = time.monotonic() - began
    assert reply.status_code == 200
    if not is_streamed:
        found = count_tokens(path, reply.json())
    elif path == "responses":
        found = count_tokens(path, events_of(reply)[-1]["response"])
    else:
        found = sum(count_tokens(path, event) for event in events_of(reply))
    assert found == (8 if path == "responses" else 16) * TOKENS
    assert {look.status for look in health.looks} == {200}
    # Written in one go, a reply of chat took 7 to 11 s of 10 to 14; a busy machine may hold a look up too.
    assert max(look.answered - look.asked for look in health.looks) < max(5.0, seconds / 2)


def test_a_workers_chunks_hold_few_entries_and_the_last_one_the_account(servers):
    body = {"model": "talking", "prompt": "x", "max_new_tokens": 100, "logprobs": 2, "stream": False}
    url = servers[1].url + "/worker_generate_stream"
    reply = httpx.post(url, json=body, headers={"x-llava-secret": SECRET}, timeout=60)
    chunks = [json.loads(part) for part in reply.content.split(b"\0") if part]
    counts = [len(chunk["logprobs"]) for chunk in chunks]
    assert sum(counts) == 100 and max(counts) <= MOST_ENTRIES
    assert {chunk["text"] for chunk in chunks} == {"x" + "word0 " * 100}
    assert [chunk.get("finish_reason") for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


LONG = [{"a": number, "é": [1.5, None, True, '"']} for number in range(3 * MOST_ENTRIES + 1)]


@pytest.mark.parametrize(
    "value",
    [{}, [], "é\n", 1, {"a": []}, LONG, {"a": 1, "b": {"c": LONG, "d": "x"}, "e": []}, [{"a": LONG}, {}, [LONG, 2]]],
)
def test_slices_are_the_same_json(value):
    whole = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    assert encoded(value) == whole
    assert is_long(value) == (f'"a":{MOST_ENTRIES}' in whole.decode())


def test_numbers_that_json_lacks_are_refused():
    with pytest.raises(ValueError):
        encoded(LONG + [float("nan")])
