"""What the page keeps of conversations: files that pretend to be one, long texts, and events that nobody reads."""

import json
import time

import httpx
import psutil
import pytest

from tests.security.page_visitor import Visitor, file_data, question
from tests.serve.processes import Process

CONTROLLER = ("--controller", "http://127.0.0.1:1")


@pytest.fixture(scope="module")
def server():
    with Process("llava.serve.gradio_web_server", *CONTROLLER) as process:
        yield process.wait(seconds=500)


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
