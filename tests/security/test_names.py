"""Under which names the servers answer, to whose pages, and to whom (rows 3 and 11; DNS rebinding).

A page of another site can reach a server on a visitor's own machine by giving its own name that machine's address.
Every attack runs against controller, worker, API and page, and against a server without protections.
"""

import base64

import httpx
import pytest

from llava.serve.hosts import Hosts
from tests.security.conftest import KEY, PIECES
from tests.security.wire import connect, head, listen
from tests.serve.processes import Process

FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "127.1",
    "a@b",
]
FOREIGN_ORIGINS = ["http://evil.example", "https://evil.example:8000", "null", "file://", "http://localhost:1", "x"]
ROUTES = {"controller": "/list_models", "worker": "/worker_get_status", "api": "/v1/models", "page": "/", "open": "/"}


def ask(stack, piece, method=None, **headers):
    """The piece's own route, or /health, with what lets a request in."""
    method = method or ("POST" if piece in ("controller", "worker") else "GET")
    sent = stack.credentials(piece) | headers
    return httpx.request(method, stack[piece].url + ROUTES[piece], headers=sent, timeout=60)


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_names_of_others_are_refused(stack, piece, host):
    reply = ask(stack, piece, host=host)
    assert (reply.status_code, reply.json()["error"]["type"]) == (421, "unknown_host")
    assert httpx.get(stack[piece].url + "/health", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_plain_server_answers_to_any_name(stack, host):
    assert ask(stack, "open", host=host).json()["host"] == host


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:80", "10.1.2.3"])
def test_addresses_and_localhost_need_no_flag(stack, piece, host):
    assert ask(stack, piece, host=host).status_code == 200


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_pages_of_others_are_refused(stack, piece, origin):
    for reply in (ask(stack, piece, origin=origin), ask(stack, piece, "OPTIONS", origin=origin)):
        assert (reply.status_code, reply.json()["error"]["type"]) == (403, "foreign_origin")
        assert not [name for name in reply.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_plain_server_lets_any_page_read(stack, origin):
    reply = ask(stack, "open", origin=origin)
    assert reply.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("piece", PIECES)
def test_its_own_page_is_answered_and_no_other_site_told_it_may_read(stack, piece):
    reply = ask(stack, piece, origin=stack[piece].url)
    assert reply.status_code == 200
    assert not [name for name in reply.headers if name.startswith("access-control-")]


def test_a_request_without_a_name_is_no_browser(stack):
    with connect(stack["api"].port) as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert listen(sock).status == 200


def test_two_names_are_refused(stack):
    for piece in PIECES:
        with connect(stack[piece].port) as sock:
            sock.sendall(head("Host: evil.example", "Connection: close"))
            assert listen(sock).error in ("unknown_host", "bad_request")
        with connect(stack[piece].port) as sock:
            sock.sendall(head("Host: localhost", "Connection: close", host="evil.example"))
            assert listen(sock).error in ("unknown_host", "bad_request")


def test_names_that_are_given():
    hosts = Hosts.of(["Scan.Example.org", "proxy"])
    assert hosts.check({"host": "scan.example.org:443", "origin": "https://scan.example.org"}) is None
    assert hosts.check({"host": "127.0.0.1:7860", "origin": "https://scan.example.org"}) is None
    assert hosts.check({"host": "scan.example.org."}) is None
    assert hosts.check({"host": "other.example.org"}) is not None
    assert hosts.check({"host": "proxy", "origin": "ftp://proxy"}) is not None
    assert hosts.check({"host": "127.0.0.1", "origin": "http://[broken"}) is not None


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A page with a name and keys, as behind a proxy."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(0o600)
    keys.write_text(f"ward {KEY}\n")
    words = ["--controller", "http://127.0.0.1:1", "--allowed-host", "scan.example.org", "--api-key-file", str(keys)]
    with Process("llava.serve.gradio_web_server", *words) as process:
        yield process.wait(seconds=500)


def test_the_page_answers_to_the_name_it_was_given(named):
    auth = ("anyone", KEY)
    for headers in ({"host": "scan.example.org"}, {"host": "scan.example.org", "origin": "https://scan.example.org"}):
        assert httpx.get(named.url, headers=headers, auth=auth, timeout=60).status_code == 200
    assert httpx.get(named.url, headers={"host": "other.example.org"}, auth=auth).status_code == 421


PATHS = [
    "/",
    "/config",
    "/gradio_api/info",
    "/gradio_api/startup-events",
    "/gradio_api/queue/data",
    "/theme.css",
    "/no",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_the_page_has_a_key(named, stack, path, method):
    """Row 11: on every route and method but /health; without keys the same requests are answered."""
    wrong = base64.b64encode(b"name:wrong-key-of-some-length").decode()
    for headers in ({}, {"authorization": f"Basic {wrong}"}, {"authorization": "Basic %%%"}, {"authorization": KEY}):
        reply = httpx.request(method, named.url + path, headers=headers, timeout=60)
        assert reply.status_code == 401 and reply.headers["www-authenticate"].startswith("Basic ")
    assert httpx.request(method, stack["page"].url + path, timeout=60).status_code != 401


def test_the_key_opens_the_page(named):
    assert httpx.get(named.url + "/health").json() == {"status": "ok"}
    for auth in (("anyone", KEY), ("", KEY)):
        assert "gradio_config" in httpx.get(named.url, auth=auth, timeout=60).text
    reply = httpx.get(named.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    assert reply.status_code == 200
    assert KEY not in named.log.read_text()


@pytest.mark.parametrize("path", ["/", "/health", "/no-such", "/config"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_page_tells_browsers_to_be_careful(stack, named, path, method):
    for url in (stack["page"].url, named.url):
        headers = httpx.request(method, url + path, timeout=60).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["img-src"] == "'self' data: blob:" and policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'self'" and policy["object-src"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert len(headers.get_list("content-security-policy")) == 1
