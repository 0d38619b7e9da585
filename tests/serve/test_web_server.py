"""The web page's server over real sockets: what it refuses, what it leaves on disk; and its conversations' state."""

import asyncio
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import gradio as gr
import httpx
import pytest
from PIL import Image
from starlette.routing import Mount

from llava.constants import NO_IMAGE
from llava.errors import LlavaError
from llava.records import iter_records
from llava.serve import gradio_web_server
from llava.serve.api.keys import read_keys
from llava.serve.client import ServingClient
from llava.serve.daily_log import DailyLog
from llava.serve.decoding.pool import DecodingPool
from llava.serve.gradio_web_server import build_parser
from llava.serve.web.chat_state import Chat, Exchange, Reply, UploadedImage
from llava.serve.web.memory_budget import DrawnViews, MemoryBudget
from llava.serve.web.page import CALLS_NOTED, MOST_SESSIONS, Page, PageOptions, build_page
from llava.serve.web.parts.examples import EXAMPLES, draw_example
from llava.serve.web.parts.scan_view import draft_of
from llava.serve.web.parts.votes import Votes
from llava.serve.web.sessions import Sessions
from tests.serve.processes import Process

ENV = {"LLAVA_SERVE_SECRET": "s3cret"}


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    log = tmp_path_factory.mktemp("web") / "log"
    with Process("llava.serve.gradio_web_server", "--controller", "http://127.0.0.1:1", env=ENV, log=log) as process:
        yield process.wait(seconds=500)
        folder = uploads(process)
        assert process.stop() in (0, -15)
        assert not folder.exists(), "uploads stay behind"


def drawn_views():
    return DrawnViews(DecodingPool(), MemoryBudget(1 << 30))


def uploads(web):
    """The server's folder for uploads."""
    path = Path(upload(web).json()[0])
    return next(parent for parent in path.parents if parent.name.startswith("llava-web-"))


def upload(web, name="x.png", content=b"x", **more):
    return httpx.post(f"{web.url}/gradio_api/upload", files={"files": (name, content, "image/png")}, timeout=60, **more)


def test_the_next_server_removes_what_a_killed_one_left(web):
    """Only that: the folder of one that runs stays."""
    words = ["--controller", "http://127.0.0.1:1"]
    with Process("llava.serve.gradio_web_server", *words, env=ENV) as killed:
        killed.wait(seconds=500)
        left, kept = uploads(killed), uploads(web)
        killed.kill()
    assert any(left.iterdir())
    with Process("llava.serve.gradio_web_server", *words, env=ENV) as following:
        following.wait(seconds=500)
        assert not left.exists() and any(kept.iterdir())


def test_starts_without_torch():
    script = (
        "import sys\nfrom pathlib import Path\n"
        "import llava.serve.gradio_web_server as w\n"
        "args = w.build_parser().parse_args([])\n"
        "w.build_app(args, None, Path('.'), w.read_keys(None, None))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"})


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=" + str(Path(__file__).resolve()),
        "/file=/etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/file=https://example.org/x",
        "/gradio_api/proxy=http://127.0.0.1:1/x",
        "/gradio_api/static/../../../../etc/passwd",
    ],
)
def test_no_file_of_the_server_and_no_other_address(web, path):
    """CVE-2024-1561, CVE-2023-51449, CVE-2024-4941 (files), CVE-2024-9308, CVE-2026-28414 (redirects)."""
    reply = httpx.get(web.url + path, follow_redirects=False, timeout=60)
    assert reply.status_code in (400, 403, 404, 405)
    assert "root:" not in reply.text and "location" not in reply.headers


def test_strange_uploads_are_refused_and_the_server_lives(web):
    """CVE-2024-12070, CVE-2024-10907, CVE-2024-53981: boundaries and file names; CVE-2026-40347: sizes."""
    long_name = upload(web, name="x" * 200_000 + ".png")
    assert long_name.status_code >= 400
    boundary = "b" * 100_000
    with contextlib.suppress(httpx.TransportError):
        reply = httpx.post(
            f"{web.url}/gradio_api/upload",
            content=b"--x\r\n" + b"-" * 5_000_000,
            headers={"content-type": f"multipart/form-data; boundary={boundary}"},
            timeout=60,
        )
        assert reply.status_code >= 400
    with contextlib.suppress(httpx.TransportError):
        assert upload(web, content=b"x" * (33 << 20)).status_code >= 400
    with socket.create_connection(("127.0.0.1", web.port), timeout=60) as raw:
        raw.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1099511627776\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    assert httpx.get(web.url + "/health", timeout=60).json() == {"status": "ok"}


def test_uploads_lie_in_a_private_folder(web):
    path = Path(upload(web, content=b"image of a patient").json()[0])
    assert path.read_bytes() == b"image of a patient"
    assert uploads(web).stat().st_mode & 0o077 == 0
    assert "patient" not in web.log.read_text()


TIDIES = """
import shutil, sys, time
from filelock import FileLock
with FileLock(sys.argv[1] + "/.lock", timeout=0):
    print(flush=True)
    time.sleep(float(sys.argv[2]))
    shutil.rmtree(sys.argv[1])
"""


@pytest.mark.parametrize("seconds", [0, 0.3], ids=["removed", "being removed"])
def test_servers_that_start_together_have_a_private_folder_each(seconds, tmp_path, monkeypatch):
    """Another server tidies up just when this one's folder was made and isn't locked yet."""
    monkeypatch.setattr(gradio_web_server, "MEMORY_FOLDER", tmp_path)
    make, others = tempfile.mkdtemp, []

    def interrupted(**options):
        folder = make(**options)
        others.append(subprocess.Popen([sys.executable, "-c", TIDIES, folder, str(seconds)], stdout=subprocess.PIPE))
        others[-1].stdout.readline()
        if not seconds:
            others[-1].wait()
        return folder

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "mkdtemp", interrupted)
        folder_of = gradio_web_server._private_folder()
        folder = folder_of.__enter__()
    assert others[0].wait() == 0
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    with gradio_web_server._private_folder() as other:
        assert set(tmp_path.iterdir()) == {folder, other}
    folder_of.__exit__(None, None, None)
    assert not any(tmp_path.iterdir())


def test_flags_that_would_tell_others_are_refused():
    for flag in ("--share", "--moderate"):
        command = [sys.executable, "-m", "llava.serve.gradio_web_server", flag]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert "another company" in done.stderr


def test_a_model_that_is_chosen_later_gets_the_conversation_so_far():
    image = UploadedImage.from_bytes(draw_example("chest"))
    first = Exchange("a", (image,), [Reply("m", "A"), None])
    chat = Chat([first, Exchange("b", (), [Reply("m", "B"), Reply("n", "X")]), Exchange("c")])
    assert [message["role"] for message in chat.messages(0)] == ["user", "assistant"] * 2 + ["user"]
    assert chat.messages(0)[0]["content"][0]["image_url"]["url"] == image.url
    assert [message["content"][-1]["text"] for message in chat.messages(1)[::2]] == ["a", "b", "c"]
    assert [message["content"] for message in chat.messages(1)[1::2]] == ["A", "X"]
    assert chat.messages(1)[0]["content"] == chat.messages(0)[0]["content"]
    assert len(chat.shown(0)) == 4 and len(chat.shown(1)) == 2
    assert chat.record()["turns"][0]["images"] == [f"sha256:{image.sha256}"]


def test_images_of_a_question_without_an_answer_go_with_the_next_one():
    """The page goes on showing them."""
    image, other = (UploadedImage.from_bytes(draw_example(name)) for name in ("chest", "tissue"))
    failed = Exchange("What is it?", (image,), [Reply("m", error="The queue is full."), None])
    chat = Chat([failed, Exchange("And the left lung?", (other,), [Reply("m", "Clear."), None]), Exchange("Sure?")])
    first, _, last = chat.messages(0)
    assert [part.get("text") for part in first["content"]] == [None, None, "And the left lung?"]
    assert [part["image_url"]["url"] for part in first["content"][:2]] == [image.url, other.url]
    assert [part["text"] for part in last["content"]] == ["Sure?"]
    assert chat.sent(0) == chat.images() == [image, other]


def test_the_page_says_that_there_is_no_image_until_there_is_one():
    image = UploadedImage.from_bytes(draw_example("chest"))
    assert NO_IMAGE in draft_of(Chat()) and NO_IMAGE in draft_of(Chat([Exchange("a", (), [Reply("m", "A"), None])]))
    assert NO_IMAGE not in draft_of(Chat(draft=[image]))
    assert draft_of(Chat([Exchange("a", (image,), [Reply("m", "A"), None])])) == ""


def test_what_is_typed_is_shown_as_typed_and_errors_have_an_id():
    reply = Reply("m", error="The queue is full.", request_id="req-1")
    chat = Chat([Exchange("<img src=x onerror=alert(1)>", (), [reply, None])])
    question, answer = chat.shown(0)
    assert "<img" not in question["content"]
    assert answer["content"] == "**The queue is full.** (request req-1)"


def test_images_are_checked_before_they_are_sent():
    buffer = io.BytesIO()
    Image.new("L", (1000, 10)).save(buffer, "PNG")
    assert UploadedImage.from_bytes(buffer.getvalue()).thumbnail.startswith("data:image/png;base64,")
    with pytest.raises(LlavaError, match="not an image"):
        UploadedImage.from_bytes(b"no image at all")
    for name, *_ in EXAMPLES:
        assert Image.open(io.BytesIO(draw_example(name))).size == (336, 336)


def test_what_the_page_is_made_of_is_decided_by_flags(tmp_path):
    pytest.importorskip("gradio", reason="gradio is in the extra serve")
    from llava.serve.web.middleware import PageMiddleware

    def pages(*words):
        args = gradio_web_server.build_parser().parse_args(["--controller", "http://127.0.0.1:1", *words])
        middleware = gradio_web_server.build_app(args, None, tmp_path, read_keys(None, None))
        while not isinstance(middleware, PageMiddleware):
            middleware = middleware.app
        (found,) = [route.app.blocks for route in middleware.app.routes if isinstance(route, Mount)]
        return middleware, found, json.dumps(found.config, default=str)

    middleware, page, text = pages()
    assert "<strong>LLaVA-Med</strong>" in text and "kept on this server" not in text
    assert page._queue.default_concurrency_limit == 16 and not middleware.embed
    words = ["--concurrency-count", "3", "--embed", "--feedback-dir", str(tmp_path / "votes"), "--feedback-days", "9"]
    middleware, page, text = pages(*words)
    assert "<strong>LLaVA-Med</strong>" not in text and "are kept on this server for 9 days" in text
    assert page._queue.default_concurrency_limit == 3 and middleware.embed


def test_a_vote_is_kept_once(tmp_path):
    """Each one holds the whole conversation."""
    tmp_path.chmod(0o700)
    with gr.Blocks():
        votes = Votes(DailyLog(tmp_path, 30))
    chat = Chat([Exchange("Is it?", (), [Reply("m", "Yes."), None], asked="2026-11-28T07:00:00+00:00")])

    async def vote(*names):
        for name in names:
            await votes._handler(name)(chat)

    def kept():
        return [record["vote"] for path in tmp_path.glob("*.jsonl") for record in iter_records(path)]

    one, other = list(votes.buttons)[:2]
    asyncio.run(vote(one, one, other, one))
    assert kept() == [one, other]
    chat.exchanges.append(Exchange("Sure?", (), [Reply("m", "No."), None]))
    asyncio.run(vote(one))
    assert kept() == [one, other, one]


def test_of_visitors_who_have_gone_little_is_kept():
    queue = build_page(ServingClient("http://127.0.0.1:1", None), PageOptions(), drawn_views())._queue
    Sessions(queue, MOST_SESSIONS, lambda name: False)
    for number in range(MOST_SESSIONS + 40):
        queue.pending_messages_per_session[str(number)] = asyncio.Queue()
    assert len(queue.pending_messages_per_session) == MOST_SESSIONS
    with gr.Blocks() as other:
        pass
    assert other.queue()._queue.ANALYTICS_MAX_EVENTS > queue.ANALYTICS_MAX_EVENTS == CALLS_NOTED


@pytest.mark.parametrize(("mode", "asked"), [("reload", 2), ("once", 1)])
def test_models_are_looked_for_once_or_all_the_time(monkeypatch, tmp_path, mode, asked):
    pytest.importorskip("gradio", reason="gradio is in the extra serve")
    from llava.serve.web.page import Page

    made, calls, start = [], [], Page.__init__
    monkeypatch.setattr(Page, "__init__", lambda self, *args: (made.append(self), start(self, *args))[1])

    async def models(client):
        calls.append(client)
        return ["m"]

    monkeypatch.setattr(ServingClient, "models", models)
    args = gradio_web_server.build_parser().parse_args(["--model-list-mode", mode])
    gradio_web_server.build_app(args, None, tmp_path, read_keys(None, None))
    asyncio.run(made[0].on_tick([], True, None, "none"))
    asyncio.run(made[0].on_tick(["m"], True, "m", "none"))
    assert len(calls) == asked


def test_the_model_that_is_named_is_chosen_first_and_a_choice_stays():
    args = build_parser().parse_args(["--first-model", "b"])

    class Client:
        log = None

        async def models(self):
            return ["a", "b", "c"]

        async def cards(self):
            return {}

    with gr.Blocks():
        page = Page(Client(), PageOptions(first_model=args.first_model), drawn_views())

    def chosen(known, model):
        return asyncio.run(page.on_tick(known, True, model, "none"))[3].value

    assert chosen([], None) == "b" and chosen(["c"], "c") == "c" and chosen(["x"], "x") == "b"
