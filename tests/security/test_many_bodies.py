"""Large bodies that a server holds at the same time are counted together; those of a request's choices too."""

import contextlib
import socket
from pathlib import Path

import httpx
import pytest

from llava.serve.transport.middleware import BODIES_AT_ONCE
from tests.security.conftest import SECRET
from tests.security.talking import serving
from tests.security.test_connections import READS_A_BODY
from tests.serve.processes import wait_until

LARGEST = 2_000_000
HEADERS = {"x-llava-secret": SECRET}


@pytest.fixture(scope="module")
def small():
    """Servers that take bodies of `LARGEST` bytes."""
    with serving("--max-body-bytes", str(LARGEST)) as servers:
        yield servers


@contextlib.contextmanager
def held(server, name, count=BODIES_AT_ONCE):
    """So many bodies of nearly the largest size, of which the end never comes."""
    head = (
        f"POST {READS_A_BODY[name]} HTTP/1.1\r\nHost: localhost\r\nx-llava-secret: {SECRET}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {LARGEST}\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            sock.settimeout(60)
            sock.sendall(head.encode() + b" " * (LARGEST - 1000))
        yield


def is_refused(reply):
    if reply.status_code != 503:
        return False
    assert reply.json()["error"]["type"] == "server_busy" and reply.headers["retry-after"] == "1"
    return True


def ask(servers, words="x", **more):
    body = {"model": "talking", "messages": [{"role": "user", "content": words}], "max_tokens": 3} | more
    return httpx.post(servers["api"].url + "/v1/chat/completions", json=body, timeout=300)


def with_image(size):
    """A question with an image of so many characters."""
    url = "data:image/png;base64," + "A" * size
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]


def in_parts(size):
    for start in range(0, size, 100_000):
        yield b" " * min(100_000, size - start)


@pytest.mark.parametrize("name", ["controller", "worker", "api"])
def test_more_large_bodies_than_a_server_holds_are_told_to_come_again(small, name):
    url = small[name].url + READS_A_BODY[name]
    with held(small[name], name):
        # With and without a length.
        wait_until(lambda: is_refused(httpx.post(url, content=b" " * 1_000_000, headers=HEADERS, timeout=60)), 60)
        assert is_refused(httpx.post(url, content=in_parts(1_000_000), headers=HEADERS, timeout=60))
        assert ask(small).status_code == 200, "plain questions aren't refused"
    wait_until(lambda: httpx.post(url, content=b" " * 1_000_000, headers=HEADERS, timeout=60).status_code != 503, 60)
    assert "Traceback" not in small[name].log.read_text()


def test_what_a_worker_refuses_the_api_passes_on(small):
    with held(small["worker"], "worker"):
        wait_until(lambda: is_refused(ask(small, with_image(1_000_000))), 60)
    wait_until(lambda: ask(small, with_image(1_000_000)).status_code == 200, 60)


def peak_memory(server):
    """Bytes."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_choices_of_a_large_request_are_made_one_after_another(is_streamed):
    with serving() as servers:
        parts = with_image(40 << 20)
        assert ask(servers, parts).status_code == 200
        before = peak_memory(servers["worker"])
        reply = ask(servers, parts, n=16, stream=is_streamed)
        assert reply.status_code == 200
        if is_streamed:
            assert reply.text.count('"finish_reason":"length"') == 16
        else:
            assert [choice["index"] for choice in reply.json()["choices"]] == list(range(16))
        assert peak_memory(servers["worker"]) - before < 300 << 20, "16 times 40 MB at once take 1.8 GB"
