"""The web page reads only what a visitor has uploaded himself, and fetches nothing (rows 2 and 3 of the attacks:
CVE-2024-1561, CVE-2023-51449, CVE-2024-4941, CVE-2024-9308, CVE-2024-12065, CVE-2024-12068, CVE-2026-28414).

Every attack runs three times: against the page as it is served, against our middleware with gradio's own checks off,
and against the same page without either, where it has to succeed.
"""

import io
import json
import os
import random
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.security.page_visitor import FILE_DATA, WORDS, Visitor, assert_refused, file_data, listener, question
from tests.serve.processes import Process, files_below, wait_until

CONTROLLER = ("--controller", "http://127.0.0.1:1")
NAME = "secret.txt"
STARTS = {
    "page": ("llava.serve.gradio_web_server", ()),
    "middleware": ("tests.security.open_page", ("--middleware",)),
    "open": ("tests.security.open_page", ()),
}


@pytest.fixture(scope="module")
def servers():
    """One of each, started together."""
    started = {name: Process(module, *CONTROLLER, *words) for name, (module, words) in STARTS.items()}
    try:
        yield {name: process.wait(seconds=500) for name, process in started.items()}
    finally:
        for process in started.values():
            process.stop()
            process.log.unlink()


@pytest.fixture(params=["page", "middleware"])
def closed(request, servers) -> Visitor:
    return Visitor(servers[request.param].url)


@pytest.fixture
def attacked(servers) -> Visitor:
    """A visitor of the page without protections."""
    return Visitor(servers["open"].url)


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "etc" / NAME
    path.parent.mkdir()
    path.write_bytes(WORDS)
    (tmp_path / "link").symlink_to(path.parent)
    return path


@dataclass(frozen=True)
class Form:
    """A way to name a file: `value` of the component; `reads` whether the open page gives the file's content."""

    value: object
    reads: bool = True
    event: object = None


def forms(path: Path) -> dict[str, Form]:
    link = path.parent.parent / "link" / path.name
    return {
        "absolute": Form(file_data(path)),
        "relative": Form(file_data(os.path.relpath(path))),
        "dots": Form(file_data(path.parent / ".." / path.parent.name / path.name)),
        "symbolic link": Form(file_data(link)),
        "in lists": Form([[[file_data(path)]]]),
        "in an object": Form({"a": {"files": [{"b": file_data(path)}]}}),
        "as a question's text": Form({"text": file_data(path), "files": []}),
        "as a question's file": Form(question(file_data(path))),
        "with an address": Form(file_data(path, url="/gradio_api/file=x", orig_name="x.png", size=1)),
        "more in meta": Form({"path": str(path), "meta": {**FILE_DATA, "more": 1}}),
        "file:": Form(file_data(f"file://{path}"), reads=False),
        "address of a file": Form(file_data("x.png", url=f"file://{path}"), reads=False),
        "stream": Form(file_data(path, is_stream=True), reads=False),
        "without meta": Form({"path": str(path)}, reads=False),
        "only an address": Form({"url": str(path), "meta": FILE_DATA}, reads=False),
        "in a question, without meta": Form(question({"path": str(path)}), reads=False),
        "in a question, a word": Form(question(str(path)), reads=False),
        "JSON in a word": Form(json.dumps(file_data(path)), reads=False),
        "a word": Form(str(path), reads=False),
        "an event's data": Form("none", reads=False, event=file_data(path)),
        "within an event's data": Form("none", reads=False, event={"value": [file_data(path)]}),
    }


@pytest.mark.parametrize("name", list(forms(Path("/a/b/c"))))
def test_no_file_of_the_server(closed, attacked, secret, name):
    form = forms(secret)[name]
    reply, content = closed.steal(closed.body([form.value, None], event_data=form.event), NAME)
    assert_refused(reply, str(secret))
    assert WORDS not in content
    reply, content = attacked.steal(attacked.body([form.value, None], event_data=form.event), NAME)
    assert reply.status_code == 200, "this doesn't reach gradio"
    assert (WORDS in content) == form.reads


def test_no_file_in_a_request_that_reads_twofold(closed, attacked, secret):
    """Requests that two readers of JSON take for different things."""
    whole = json.dumps(attacked.body([file_data(secret), None]))
    own = closed.upload("own.png").json()[0]
    for raw in (
        whole.replace('"path"', f'"path": "{own}", "path"'),
        whole.replace('"data"', '"data": [null, null], "data"'),
        whole.encode("utf-16"),
        b"\xef\xbb\xbf" + whole.encode(),
    ):
        reply, content = closed.steal(raw, NAME)
        assert_refused(reply, str(secret))
        assert WORDS not in content
        assert WORDS in attacked.steal(raw, NAME)[1]


def test_no_file_anywhere_in_a_request(closed, attacked, secret):
    """The object at random places of an else well-formed call."""
    dice = random.Random(1)
    read = 0
    for _ in range(40):
        bait = file_data(secret)
        for key in dice.sample(["url", "orig_name", "size", "mime_type", "is_stream", "extra"], dice.randrange(4)):
            bait[key] = dice.choice([None, "x.png", 1, False])
        for _ in range(dice.randrange(6)):
            bait = dice.choice(
                [
                    lambda x: [x],
                    lambda x: [None, x],
                    lambda x: {"value": x},
                    lambda x: question(x),
                    lambda x: {"__type__": x},
                ]
            )(bait)
        place = dice.choice(["first", "second", "event", "field"])
        calls = []
        for visitor in (closed, attacked):
            call = visitor.body(["none", None])
            if place in ("first", "second"):
                call["data"][place == "second"] = bait
            else:
                call["event_data" if place == "event" else dice.choice(["oauth_token", "batched", "data"])] = bait
            calls.append(call)
        reply, content = closed.steal(calls[0], NAME)
        assert_refused(reply, str(secret))
        assert WORDS not in content
        read += WORDS in attacked.steal(calls[1], NAME)[1]
    assert read > 3, "the attack never succeeds"


def test_own_uploads_and_only_those(closed, attacked):
    """A visitor's file is his: shown to him, taken from him, and neither to or from another."""
    for first in (closed, attacked):
        first.client.cookies.set("another", '{"program\'s": ["odd, cookie"]}')
        path = first.upload("patient.png", WORDS).json()[0]
        other = Visitor(str(first.client.base_url))
        assert first.read(path).content == WORDS
        assert first.send(first.body([question(file_data(path)), None]))[0].status_code == 200
        reply, content = other.steal(other.body([question(file_data(path)), None]), "patient.png")
        shown = other.read(path)
        if first is attacked:
            assert WORDS in content and shown.content == WORDS
        else:
            assert_refused(reply, path)
            assert_refused(shown, path)
            assert WORDS not in content


@pytest.mark.parametrize("spelling", ["{}", "/{}", "{}/", "{}?x", "{}%00", "./{}", "{}/%2e%2e/x.png", "%2e%2e{}"])
def test_an_upload_has_one_name(closed, spelling):
    """Only letter for letter what the upload was answered with; that works, so the refusals mean something."""
    path = closed.upload("x.png", WORDS).json()[0]
    reply = closed.read(spelling.format(path))
    if spelling in ("{}", "{}?x"):
        assert reply.content == WORDS
        assert (
            reply.headers["x-content-type-options"] == "nosniff"
            and "sandbox" in reply.headers["content-security-policy"]
        )
    else:
        assert_refused(reply, path)


@pytest.mark.parametrize("path", ["{0}", "..{0}", "file://{0}", "%2e%2e{0}", "/dev/shm", "/proc/self/environ", ""])
def test_no_file_by_its_address(closed, secret, path):
    assert_refused(closed.read(path.format(secret)), str(secret))


def test_what_the_page_shows_is_no_page(closed, attacked):
    """An uploaded page never runs with this one's rights: it is handed out as a file to save."""
    content = b"<script>alert(1)</script>"
    for name in ("x.html", "x.svg", "x.xhtml", "x.js", "x", "x.pdf"):
        reply = closed.read(closed.upload(name, content).json()[0])
        assert reply.content == content
        assert reply.headers["content-type"] == "application/octet-stream"
        assert reply.headers["content-disposition"] == "attachment"
    with closed.client.stream("GET", "/") as page:
        assert "httponly" not in page.headers.get("set-cookie", "").lower()  # it has its cookie already
    first = httpx.get(closed.client.base_url)
    assert "HttpOnly; SameSite=Lax" in first.headers["set-cookie"]


@pytest.mark.parametrize("scheme", ["http", "HTTP", "https", "ftp", "data", "//"])
def test_nothing_is_fetched(closed, attacked, scheme):
    with listener() as (url, asked):
        host = url.removeprefix("http://")
        address = {"data": "data:text/plain,inner.txt", "//": f"//{host}/inner.txt"}.get(
            scheme, f"{scheme}://{host}/inner.txt"
        )
        own = closed.upload("own.png").json()[0]
        for value in (
            file_data(address),
            question(file_data(address)),
            [file_data(address)],
            address,
            file_data(own, url=address),
            question(file_data(own, url=address)),
        ):
            reply, content = closed.steal(closed.body([value, None]), "inner.txt")
            assert_refused(reply, host)
            assert WORDS not in content
        assert_refused(closed.read(address), host)
        assert_refused(closed.client.get(f"/gradio_api/proxy={address}"), host)
        assert asked == []
        reply, content = attacked.steal(attacked.body([file_data(address), None]), "inner.txt")
        assert reply.status_code == 200, "this doesn't reach gradio"
        if scheme == "http":
            assert asked == ["/inner.txt"] and content == WORDS


def test_handlers_are_called_as_the_page_calls_them(closed, attacked):
    """A handler of the queue called directly would pass by the cap on answers at a time."""
    stop = closed.body([None], "stop", "click")
    assert closed.send(stop, "run/predict")[0].status_code == 200
    queued = closed.body(["none", None])
    assert closed.send(queued)[0].status_code == 200
    for call, route in (
        (stop, "queue/join"),
        (queued, "run/predict"),
        ({**queued, "data": []}, "queue/join"),
        ({**queued, "fn_index": 9999}, "queue/join"),
    ):
        assert_refused(closed.send(call, route)[0])
        assert attacked.send({**call, "session_hash": attacked.session}, route)[0].status_code in (200, 500)


@pytest.mark.parametrize(
    "route",
    """GET /config
    GET /manifest.json
    GET /gradio_api/info
    GET /gradio_api/openapi.json
    GET /gradio_api/deep_link?session_hash=x
    GET /gradio_api/queue/status
    GET /gradio_api/user
    GET /gradio_api/token
    GET /gradio_api/login_check
    GET /gradio_api/startup-events
    GET /gradio_api/vibe-code
    GET /gradio_api/proxy=http://127.0.0.1:1/x
    GET /monitoring
    GET /monitoring/summary
    GET /logout
    POST /login
    POST /gradio_api/process_recording
    POST /gradio_api/component_server
    POST /gradio_api/stream/x
    POST /gradio_api/call/predict
    POST /gradio_api/call/v2/predict
    POST /gradio_api/api/predict
    POST /gradio_api/run/on_ask
    POST /gradio_api/reset
    POST /gradio_api/vibe-edit
    PUT /
    OPTIONS /gradio_api/upload""".splitlines(),
)
def test_gradio_routes_are_an_allow_list(closed, attacked, route):
    method, path = route.split()
    reply = closed.client.request(method, path)
    assert_refused(reply)
    assert reply.status_code == 404
    assert attacked.client.request(method, path).status_code != 404, "there is no such route"


def test_the_pages_own_address_takes_nothing(closed, attacked):
    """`deep_link` would read a saved state from a file."""
    state = re.compile(r'"deep_link_state":\s*"(\w+)"')
    for visitor, expected in ((closed, "none"), (attacked, "invalid")):
        assert state.search(visitor.client.get("/?deep_link=..%2F..%2Fx").text).group(1) == expected


def test_images_in_conversations_have_a_total():
    """What a conversation holds counts until it is cleared, also once its files are gone."""
    noise = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")  # 3 MB, 4 as text, twice: as it came, and as it is shown
    with Process("llava.serve.gradio_web_server", *CONTROLLER, "--upload-mb", "20") as process:
        process.wait(seconds=500)
        visitors = [Visitor(process.url) for _ in range(3)]

        def is_refused(visitor):
            path = visitor.upload("noise.png", buffer.getvalue()).json()[0]
            (last,) = [
                event
                for event in visitor.call(*visitor.place("box", "submit"), box=question(file_data(path), text=""))
                if event["msg"] == "process_completed"
            ]
            assert last["success"]
            return "too many images" in json.dumps(last["output"])

        assert [is_refused(visitor) for visitor in visitors] == [False, False, True]
        visitors[0].call(*visitors[0].place("clear", "click"))
        assert not is_refused(visitors[2])
        process.stop()


def test_what_breaks_off_leaves_nothing(servers):
    left = {}
    for name in ("page", "open"):
        visitor = Visitor(servers[name].url)
        path = Path(visitor.upload("whole.png").json()[0])
        folder = next(parent for parent in path.parents if parent.name.startswith("llava-"))
        before = size(folder)
        with socket.create_connection(("127.0.0.1", servers[name].port), timeout=60) as raw:
            raw.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
                b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + b"x" * 3_000_000
            )
            wait_until(lambda folder=folder, before=before: size(folder) > before + 2_000_000, 60)
        if name == "page":
            wait_until(lambda folder=folder, before=before: size(folder) == before, 60)
        left[name] = size(folder) - before
    assert left["page"] == 0 and left["open"] > 2_000_000


@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/x.png", "..", "", "a" * 300 + ".png", "x\x00y.png", "é ü.dcm", ".x"]
)
def test_names_of_uploads_stay_names(closed, name):
    reply = closed.client.post(
        "/gradio_api/upload",
        content=b'--b\r\nContent-Disposition: form-data; name="files"; filename="'
        + name.encode()
        + b'"\r\n\r\nx\r\n--b--\r\n',
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    if reply.status_code != 200:
        return assert_refused(reply)
    (path,) = reply.json()
    assert len(Path(path).name) <= 100 and re.fullmatch(r"/[\w/.() +-]+/[\w-]{32}/0/[\w .()+-]+", path)
    assert Path(path).name[-4:] == name[-4:] or len(name) < 4
    assert closed.read(path).content == b"x"


def size(folder: Path) -> int:
    return sum(len(content) for content in files_below(folder).values())
