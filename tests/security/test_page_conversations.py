"""What the page keeps of conversations: files that pretend to be one, long texts, and events that nobody reads."""

import json
import time
from contextlib import ExitStack

import httpx
import psutil
import pytest

from llava.serve.web.chat_state import MOST_TEXT
from tests.security.page_visitor import Visitor, assert_refused, file_data, question
from tests.serve.processes import Process, wait_until

ENV = {"LLAVA_SERVE_SECRET": "s3cret"}


@pytest.fixture(scope="module")
def server():
    """The page, with a worker that repeats what it is asked."""
    with ExitStack() as stack:
        controller = stack.enter_context(Process("llava.serve.controller", env=ENV))
        words = ["--controller", controller.url]
        worker = stack.enter_context(Process("tests.serve.scripted_worker", *words, env=ENV))
        page = stack.enter_context(Process("llava.serve.gradio_web_server", *words, env=ENV))
        worker.wait(seconds=500)
        yield page.wait(seconds=500)


def add(visitor: Visitor, name: str, content: bytes) -> tuple[str, str]:
    """(where an upload lay, all that its reading was answered with)."""
    path = visitor.upload(name, content).json()[0]
    return path, json.dumps(visitor.call(*visitor.place("take", "click"), box=question(file_data(path), text="")))


@pytest.mark.parametrize(
    "content",
    [b"<!doctype html><pre>" + b"a<b>" * (7 << 20), b"<!doctype html><![a<![a", b"{" * (28 << 20)],
    ids=["tags", "declaration", "brackets"],
)
def test_a_file_that_is_no_export_is_refused_and_goes(server, content):
    """A page of many tags took minutes of the processor, and what no parser takes stayed."""
    visitor, process = Visitor(server.url), psutil.Process(server.process.pid)
    began = process.cpu_times().user
    path, said = add(visitor, "x.html", content)
    assert "an export of this page; export the conversation anew" in said
    time.sleep(3)  # what went on in a thread would show
    assert process.cpu_times().user - began < 30
    assert visitor.read(path).status_code == 403
    assert httpx.get(server.url + "/health", timeout=60).status_code == 200


def rss(server) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


def export_of(length: int) -> bytes:
    """Of a conversation of so many characters that HTML writes as five."""
    half = "&" * (length // 2)
    return json.dumps({"turns": [{"question": half, "answers": [{"model": "m", "text": half}]}]}).encode()


def call_unheard(visitor: Visitor, element: str, *values) -> httpx.Response:
    """A click of which nobody reads the events."""
    body = visitor.body([None, *values], element, "input" if element == "speed" else "click")
    return visitor.client.post("/gradio_api/queue/join", json=body)


def test_what_nobody_reads_levels_off(server):
    """Each call left what it was answered with in the server, for good."""
    visitor, other = Visitor(server.url), Visitor(server.url)
    add(visitor, "x.json", export_of(MOST_TEXT))
    assert len(json.dumps(visitor.call(*visitor.place("export-page", "click")))) > 5 * MOST_TEXT
    before, most = rss(server), 0
    for _ in range(150):
        assert call_unheard(visitor, "export-page").status_code in (200, 429)
        wait_until(lambda: httpx.get(server.url + "/health", timeout=60).status_code == 200, 60)
        most = max(most, rss(server) - before)
    assert most < 300 << 20, "150 answers of 4 MB wait"
    assert '"success": true' in json.dumps(other.call(*other.place("clear", "click")))
    assert '"success": true' in json.dumps(visitor.call(*visitor.place("clear", "click")))


def test_who_reads_nothing_is_told_to_wait(server):
    visitor, other = Visitor(server.url), Visitor(server.url)
    add(visitor, "x.json", export_of(1000))
    answered = [call_unheard(visitor, "speed", bool(number % 2)) for number in range(300)]
    refused = answered[-1]
    assert answered[20].status_code == 200
    assert refused.status_code == 429 and "waits to be read" in refused.json()["detail"]
    assert '"success": true' in json.dumps(other.call(*other.place("clear", "click")))
    with visitor.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": visitor.session}) as stream:
        assert "close_stream" in list(filter(None, stream.iter_lines()))[-1]
    assert call_unheard(visitor, "speed", True).status_code == 200


def test_a_conversations_text_has_a_total(server):
    """When an export is opened, when asking, and when an answer arrives."""
    reopening = Visitor(server.url)
    assert "at most 262,144 characters" in add(reopening, "x.json", export_of(MOST_TEXT + 4))[1]
    assert "nothing to export" in json.dumps(reopening.call(*reopening.place("export", "click")))
    add(reopening, "x.json", export_of(MOST_TEXT - 4))
    assert "nothing to export" not in json.dumps(reopening.call(*reopening.place("export", "click")))
    visitor = Visitor(server.url)
    wait_until(lambda: "scripted" in json.dumps(visitor.call(*visitor.place("accept", "click"))), 60)

    def ask(each: Visitor, text: str) -> str:
        return json.dumps(each.call(*each.place("box", "submit"), box=question(text=text), model="scripted"))

    too_long = "A conversation holds at most 262,144 characters. Clear it first."
    assert too_long in ask(visitor, "q" * (MOST_TEXT + 1))
    assert too_long not in ask(visitor, "q" * 1000)
    assert too_long in ask(visitor, "q" * (MOST_TEXT - 3000)), "the answer has no place"
    (last,) = [
        event for event in visitor.call(*visitor.place("export", "click")) if event["msg"] == "process_completed"
    ]
    turns = json.loads(json.loads(last["output"]["data"][0])["content"])["turns"]
    texts = [text for turn in turns for text in (turn["question"], *(each["text"] for each in turn["answers"]))]
    assert len(turns) == 2 and sum(map(len, texts)) <= MOST_TEXT and turns[1]["answers"][0]["error"] == too_long
    assert too_long in ask(visitor, "q" * 3000)
    assert "process_completed" in json.dumps(visitor.call(*visitor.place("clear", "click")))
    assert too_long not in ask(visitor, "q")


def test_a_conversation_is_of_the_visitor_who_began_it(server):
    """Its name stands in addresses, and so in logs of proxies: who knows it gets nothing, and ends nothing."""
    owner, other, nobody = (Visitor(server.url) for _ in range(3))
    nobody.client.cookies.clear()
    add(owner, "x.json", export_of(1000))
    own = dict(owner.call(*owner.place("export", "click"))[-2])
    assert "turns" in own["output"]["data"][0]
    name = owner.session
    for stranger in (other, nobody):
        calls = [
            ("queue/join", stranger.body([None], "export", "click", session_hash=name)),
            ("run/predict", stranger.body([None], "stop", "click", session_hash=name)),
            ("cancel", {"session_hash": name, "fn_index": 0, "event_id": "x"}),
        ]
        for route, body in calls:
            reply = stranger.client.post(f"/gradio_api/{route}", json=body)
            assert_refused(reply)
            assert reply.status_code == 403 and "isn't yours" in reply.json()["detail"]
        for path in (f"queue/data?session_hash={name}", f"heartbeat/{name}"):
            reply = stranger.client.get(f"/gradio_api/{path}")
            assert_refused(reply)
            assert reply.status_code == 403
    # Each still has his own.
    assert "nothing to export" in json.dumps(other.call(*other.place("export", "click")))
    assert "nothing to export" in json.dumps(nobody.call(*nobody.place("export", "click")))
    assert "turns" in json.dumps(owner.call(*owner.place("export", "click")))


@pytest.mark.parametrize("first", ["heartbeat", "queue/data"])
def test_a_page_that_only_listens_has_its_session(server, first):
    owner, other = Visitor(server.url), Visitor(server.url)
    path = {"heartbeat": f"heartbeat/{owner.session}", "queue/data": f"queue/data?session_hash={owner.session}"}[first]
    with owner.client.stream("GET", f"/gradio_api/{path}") as reply:
        assert reply.status_code == 200
        body = other.body([None], "export", "click", session_hash=owner.session)
        assert other.client.post("/gradio_api/queue/join", json=body).status_code == 403
    assert "nothing to export" in json.dumps(owner.call(*owner.place("export", "click")))
