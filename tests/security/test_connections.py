"""Headers, chunks and bodies that never end, or come a byte at a time (rows 4 and 5: CVE-2024-12070, CVE-2024-10907,
CVE-2024-10912, CVE-2026-6607): refused in the one form of errors before anything is parsed, while others are served.

Every attack runs against controller, worker, API and page, and against plain uvicorn, where it has to succeed.
"""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.security.conftest import PIECES
from tests.security.wire import connect, credential_lines, drip, head, listen, send
from tests.serve.processes import Process, wait_until

CHUNKED = ("Transfer-Encoding: chunked",)
POST = {"method": "POST", "path": "/"}
READS_A_BODY = {
    "controller": "/get_worker_address",
    "worker": "/worker_generate_stream",
    "api": "/v1/chat/completions",
    "page": "/gradio_api/queue/join",
    "open": "/",
}
TOO_LONG = {
    "a header": [b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ", *[b"a" * 65536] * 16],
    "an address": [b"GET /", *[b"a" * 65536] * 16],
    "a method": [*[b"A" * 65536] * 16],
    "many headers": [head(*(f"X-{number}: y" for number in range(150)))],
    "small headers": [b"GET /health HTTP/1.1\r\nHost: localhost\r\n", *[b"a:\r\n" * 1024] * 100],
}
IN_BODY = {
    "a chunk's extension": [b"5;x=", *[b"a" * 65536] * 16],
    "trailers": [b"2\r\n{}\r\n0\r\n", *[b"X-Trailer: " + b"a" * 4096 + b"\r\n"] * 256],
    "tiny chunks": [b"1;" + b"a" * 50 + b"\r\nx\r\n"] * 3000,
}


def begin(stack, piece, *lines):
    """The head of a post to a route that reads a body."""
    lines = [*lines, "Content-Type: application/json", *credential_lines(stack.credentials(piece))]
    return head(*lines, method="POST", path=READS_A_BODY[piece])


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("attack", TOO_LONG)
def test_heads_are_short(stack, piece, attack):
    said = send(stack[piece].port, *TOO_LONG[attack])
    assert said.is_closed and said.status in (400, 431), said.content[:200]
    assert said.error in ("headers_too_large", "bad_request")
    assert httpx.get(stack[piece].url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize("attack", sorted(TOO_LONG.keys() - {"a method"}))
def test_plain_uvicorn_takes_long_heads(stack, attack):
    said = send(stack["open"].port, *TOO_LONG[attack], seconds=1)
    assert said.status != 431 and (not said.is_closed or said.status == 200)


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("attack", IN_BODY)
def test_what_stands_around_a_body_is_short(stack, piece, attack):
    said = send(stack[piece].port, begin(stack, piece, *CHUNKED), *IN_BODY[attack])
    assert said.is_closed and said.error == "headers_too_large", said.content[:300]
    assert httpx.get(stack[piece].url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize("attack", IN_BODY)
def test_plain_uvicorn_reads_all_around_a_body(stack, attack):
    assert not send(stack["open"].port, begin(stack, "open", *CHUNKED), *IN_BODY[attack], seconds=1).is_closed


def test_slow_and_silent_clients_are_sent_away(stack):
    """All at the same time, since each takes as long as the servers wait."""
    attacks = {
        "head": lambda piece: (b"GET /", b"x"),
        "second head": lambda piece: (head() + b"GET /", b"x"),
        "blank lines": lambda piece: (head(), b"\r\n"),
        "silence": lambda piece: (b"", b""),
        "body": lambda piece: (begin(stack, piece, "Content-Length: 5000"), b" "),
    }
    jobs = [(piece, name) for piece in (*PIECES, "open") for name in attacks]

    def run(job):
        piece, name = job
        return drip(stack[piece].port, *attacks[name](piece), seconds=14 if piece == "open" else 30)

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = dict(zip(jobs, pool.map(run, jobs), strict=True))
    for (piece, name), said in found.items():
        if piece == "open":
            assert not said.is_closed, name
        elif name == "silence":
            assert said.is_closed and said.content == b"", piece
        else:
            assert said.is_closed and said.error == "request_timeout", (piece, name, said.content[-300:])


LIMITS = {
    "head_seconds": 1,
    "body_seconds": 1,
    "body_rate": 1000,
    "read_seconds": 1,
    "pipelined": 20,
    "connections": 20,
}


@pytest.fixture(scope="module")
def limited():
    """The open application behind our connections, with short times and few connections."""
    with Process("tests.security.standins", "--limits", json.dumps(LIMITS)) as process:
        yield process.wait()


def test_a_body_that_comes_fast_enough_is_read_to_its_end(limited):
    """Also one that takes longer than the time for a stretch, and one in many chunks."""
    parts = [head("Content-Length: 10000", "Connection: close", **POST), *[b"x" * 1000] * 10]
    said = send(limited.port, *parts, wait=0.3)
    assert said.status == 200 and json.loads(said.content.rpartition(b"\r\n\r\n")[2])["body"] == 10000
    chunks = [b"3e8\r\n" + b"x" * 1000 + b"\r\n"] * 5 + [b"0\r\nX-Trailer: y\r\n\r\n"]
    said = send(limited.port, head("Connection: close", *CHUNKED, **POST), *chunks, wait=0.2)
    assert said.status == 200 and json.loads(said.content.rpartition(b"\r\n\r\n")[2])["body"] == 5000


def test_requests_sent_together_are_answered_in_order(limited):
    parts = head() + head("Content-Length: 3", **POST) + b"abc" + head("Connection: close", path="/running")
    said = send(limited.port, parts)
    bodies = [part.partition(b"}")[0] for part in said.content.split(b"{")[1:]]
    assert len(bodies) == 3 and b'"body": 3' in bodies[1] and b"running" in bodies[2]


def test_requests_that_wait_for_answers_to_others_are_counted(limited):
    """Those beyond are not read, and the connection ends with the last answer."""
    said = send(limited.port, head() * 5000, seconds=20)
    assert said.is_closed and 20 <= said.content.count(b"HTTP/1.1 200") <= 21


def test_an_answer_is_not_broken_by_what_comes_after_it(limited):
    """A bad second request while the first is answered ends the connection; no words go into the answer."""
    with connect(limited.port) as sock:
        sock.sendall(head(path="/stream") + b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 100_000)
        said = listen(sock)
    assert said.is_closed and b"headers_too_large" not in said.content


def test_an_answer_that_nobody_reads_is_given_up(limited, stack):
    """The system takes some of it, the server's process holds the rest until the client has been silent too long."""

    def leave_unread(port):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", port))
            sock.sendall(head(path="/large"))
            time.sleep(5)
            received = 0
            with contextlib.suppress(ConnectionError, TimeoutError):
                sock.settimeout(5)
                while data := sock.recv(1 << 20):
                    received += len(data)
            return received

    assert leave_unread(limited.port) < 30_000_000 < leave_unread(stack["open"].port)


def test_connections_are_counted(limited):
    """The twenty-first is told so; idle ones give way, and a place is free when one leaves."""
    holding = [connect(limited.port) for _ in range(LIMITS["connections"])]
    try:
        for sock in holding:
            sock.sendall(b"GET /health HTTP/1.1\r\n")
        time.sleep(0.2)
        said = send(limited.port, b"")
        assert said.is_closed and said.error == "too_many_connections" and b"retry-after: 1" in said.content
    finally:
        for sock in holding:
            sock.close()
    wait_until(lambda: send(limited.port, head("Connection: close")).status == 200, 20)
    with httpx.Client(limits=httpx.Limits(max_keepalive_connections=100)) as client:
        replies: list[int] = []

        def ask():
            for _ in range(3):
                replies.append(client.get(limited.url + "/health").status_code)

        threads = [threading.Thread(target=ask) for _ in range(15)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert replies == [200] * 45
        # The client keeps its connections; who comes now gets the place of one of them.
        idle = [connect(limited.port) for _ in range(10)]
        for sock in idle:
            sock.sendall(head())
            assert sock.recv(12) == b"HTTP/1.1 200"
            sock.close()


def test_plain_uvicorn_counts_no_connections(stack):
    holding = [connect(stack["open"].port) for _ in range(100)]
    assert send(stack["open"].port, head("Connection: close")).status == 200
    for sock in holding:
        sock.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"CONNECT example.org:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
@pytest.mark.parametrize("piece", PIECES)
def test_what_is_no_request_is_refused_or_answered(stack, piece, request_):
    with connect(stack[piece].port) as sock:
        sock.sendall(request_)
        said = listen(sock, 1.5)
    assert said.status is not None and said.status != 101 and said.status < 500, said.content[:200]
    assert httpx.get(stack[piece].url + "/health").json() == {"status": "ok"}
    assert "Traceback" not in stack[piece].log.read_text()


@pytest.mark.parametrize("piece", ["controller", "worker", "api"])
def test_a_body_that_comes_after_its_refusal_leaves_the_connection_open(stack, piece):
    """A client may send headers and body apart: the next request on the connection is answered too."""
    first = head("Content-Length: 2", "Content-Type: application/json", method="POST", path=READS_A_BODY[piece])
    with connect(stack[piece].port) as sock:
        for body in (b"{}", b""):
            sock.sendall(first)
            said = b""
            while b"\r\n\r\n" not in said or b"unauthorized" not in said:
                said += sock.recv(65536)
            assert said.startswith(b"HTTP/1.1 401")
            sock.sendall(body)
