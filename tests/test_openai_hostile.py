"""A language-model server that sends what none should: a failed item in words, in bounded time and memory."""

import gzip
import json
import queue
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llava.errors import LlavaError
from llava.openai_api import ApiSettings, ChatJob, run_jobs
from llava.openai_client.transport import MOST_EVENT, MOST_REPLY
from llava.resumable import ResumableJsonl
from llava.serve.job import read_job
from llava.serve.worker.upstream_backend import UpstreamBackend
from llava.serve.worker_answers import Chunk

pytest.importorskip("openai", reason='the openai package is in the extra "openai"')

ANSWER = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}


def reply(self, content, kind="application/json", **headers):
    self.send_response(200)
    for name, value in {"content-type": kind, **headers}.items():
        self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    self.wfile.write(content)


def redirect(self):
    self.send_response(307)
    self.send_header("location", self.server.elsewhere)
    self.send_header("content-length", "0")
    self.end_headers()


def drip(self):
    reply(self, b"")
    for _ in range(40):
        self.wfile.write(b" ")
        time.sleep(0.1)
    self.wfile.write(json.dumps(ANSWER).encode())


def with_usage(prompt, completion):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return lambda self: reply(self, json.dumps(ANSWER | {"usage": usage}).encode())


HOSTILE = {
    "HTTP 307": redirect,
    "compressed, though": lambda self: reply(self, gzip.compress(json.dumps(ANSWER).encode()), content_encoding="gzip"),
    "larger than": lambda self: reply(self, b" " * (MOST_REPLY + 1) + json.dumps(ANSWER).encode()),
    "not JSON": lambda self: reply(self, b"[" * 200_000),
    "timed out": drip,
}


@contextmanager
def server(answer, elsewhere=""):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.asked += 1
            self.rfile.read(int(self.headers["content-length"]))
            with suppress(OSError):
                answer(self)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.asked, found.elsewhere = 0, elsewhere
        found.url = f"http://127.0.0.1:{found.server_port}/v1"
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(url, path, **more):
    config = ApiSettings(model="m", api_key="key", base_url=url, timeout=2.0, max_retries=0, **more)
    job = ChatJob(1, [{"role": "user", "content": "of a patient"}])
    with ResumableJsonl(path / "out.jsonl") as output:
        return run_jobs([job], config, output, lambda job, result: {"question_id": job.key, "text": result.text})


@pytest.mark.parametrize("words", HOSTILE)
def test_a_hostile_reply_is_a_failed_item(words, tmp_path):
    with server(with_usage(1, 1)) as other, server(HOSTILE[words], other.url + "/chat/completions") as asked:
        summary = ask(asked.url, tmp_path)
        assert (asked.asked, other.asked) == (1, 0), "what is asked goes nowhere else"
    assert words in summary.failed[1]


@pytest.mark.parametrize("count", [-1_000_000, 10**400, True, "many"])
def test_tokens_that_can_not_be_cost_nothing(count, tmp_path):
    """A negative number would give money back; one without end isn't even a price."""
    with server(with_usage(count, count)) as asked:
        summary = ask(asked.url, tmp_path, price_in=1.0, price_out=1.0)
    assert summary.done == 1 and summary.account.spent == pytest.approx(0.0, abs=1e-5)


EVENTS = {
    "one event": b"data: " + b"x" * (MOST_EVENT + 1) + b"\n\n",
    "an event of many lines": b"data:\n" * (MOST_EVENT // 6 + 1),
}


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_without_end_ends_the_stream(name):
    """The package joins its lines, each time anew, while nobody else at this worker is answered."""
    closed = threading.Event()

    def stream(self):
        reply(self, b"", "text/event-stream")
        try:
            while True:
                self.wfile.write(EVENTS[name].removesuffix(b"\n\n"))
        finally:
            closed.set()

    assert [piece.error is not None for piece in pieces_of(stream)] == [True] and closed.wait(30)


def pieces_of(answer, **more):
    """What a worker gets from such a server for one question."""
    pieces = queue.Queue()
    with server(answer) as asked:
        backend = UpstreamBackend(asked.url, "m")
        backend.submit(read_job({"messages": [{"role": "user", "content": "Hi"}], **more}), pieces.put)
        found = [pieces.get(timeout=120)]
        while not found[-1].is_last:
            found.append(pieces.get(timeout=120))
        backend.close()
    return found


ENTRY = {"token": "x", "bytes": None, "logprob": -1.0}
DELTAS = {
    "text": {"delta": {"content": "x" * 1000}},
    "log probabilities": {
        "delta": {"content": ""},
        "logprobs": {"content": [ENTRY | {"top_logprobs": [ENTRY] * 20}] * 3},
    },
}


@pytest.mark.parametrize("name", DELTAS)
def test_an_answer_longer_than_what_was_asked_for_is_cut_off(name):
    """It is kept until its end, and sent on whole with each chunk."""
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    line = f"data: {json.dumps(chunk | {'choices': [{'index': 0, 'finish_reason': None} | DELTAS[name]]})}\n\n"

    def stream(self):
        reply(self, b"", "text/event-stream")
        for _ in range(5000):
            self.wfile.write(line.encode())

    pieces = pieces_of(stream, max_new_tokens=64, logprobs=2)
    assert pieces[-1].finish_reason == "length"
    Chunk.model_validate({"text": "", "finish_reason": "length", "usage": pieces[-1].usage})
    assert sum(len(piece.text) for piece in pieces) <= 64 * 256
    entries = [entry for piece in pieces for entry in piece.logprobs]
    assert len(entries) <= 64 and all(len(entry["top"]) == 2 for entry in entries)


@pytest.mark.parametrize(
    ("written", "kept"), [([0xE6], [0xE6]), (None, None), ([256], None), ("x", None), ([[]], None), ([1] * 999, None)]
)
def test_bytes_of_a_part_of_a_character_are_passed_on(written, kept):
    entry = {"token": "\ufffd", "bytes": written, "logprob": -1.0}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    choice = {"index": 0, "delta": {"content": ""}, "logprobs": {"content": [entry | {"top_logprobs": [entry]}]}}

    def stream(self):
        reply(self, b"", "text/event-stream")
        for reason in (None, "stop"):
            self.wfile.write(
                f"data: {json.dumps(chunk | {'choices': [choice | {'finish_reason': reason}]})}\n\n".encode()
            )

    first, *_, last = pieces_of(stream, logprobs=1)
    assert last.error is None and first.logprobs[0].get("bytes") == first.logprobs[0]["top"][0].get("bytes") == kept


@pytest.mark.parametrize(
    "usage", [None, {}, {"prompt_tokens": -1, "completion_tokens": 10**400}, {"prompt_tokens": "x"}]
)
def test_a_count_that_is_none_loses_no_answer(usage):
    """Whoever asked the worker takes a last chunk without its account for the worker's end."""
    line = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", "usage": usage}
    line["choices"] = [{"index": 0, "delta": {"content": "yes"}, "finish_reason": "stop"}]
    pieces = pieces_of(lambda self: reply(self, f"data: {json.dumps(line)}\n\n".encode(), "text/event-stream"))
    assert [piece.text for piece in pieces] == ["yes", ""]
    Chunk.model_validate({"text": "yes", "finish_reason": "stop", "usage": pieces[-1].usage})


@pytest.mark.parametrize("place", ["files", "batches"])
def test_a_batch_is_not_waited_for_without_end(place, tmp_path, monkeypatch):
    monkeypatch.setattr("llava.openai_client.batch._MOST_SECONDS", 1.0)

    def answer(self):
        if place in self.path:
            drip(self)
        else:
            reply(self, json.dumps({"id": "file-1", "object": "file"}).encode())

    with server(answer) as asked, pytest.raises(LlavaError, match=r"no whole reply within 1 s.*run again"):
        ask(asked.url, tmp_path, batch_api=True)
