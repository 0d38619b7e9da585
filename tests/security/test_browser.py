"""In a real browser: an answer's images make no request to others, and a whole conversation leaves nothing behind
(row 12)."""

import base64
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.security.page_visitor import listener
from tests.serve.processes import Process, files_below, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
CHROMIUM = os.environ.get("LLAVA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install it or set LLAVA_CHROMIUM")

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PATIENCE = 240_000  # ms
KEY = "key-of-the-ward"
WORDS = "Frau Musterfrau, geboren am 1.2.1934"
IN_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where the servers of this file may write: home, temporary files, logs."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("tmp", "logs"):
        (folder / name).mkdir()
    (folder / "keys").touch(0o600)
    (folder / "keys").write_text(f"ward {KEY}\n")
    return folder


@pytest.fixture(scope="module")
def page_url(home):
    """The page with keys and votes, and a worker that repeats what it is asked."""
    names = {"HOME": home, "TMPDIR": home / "tmp", "XDG_CACHE_HOME": home / "cache"}
    env = {"LLAVA_SERVE_SECRET": "s3cret", **{name: str(path) for name, path in names.items()}}
    with ExitStack() as stack:

        def start(name, module, *words):
            process = Process(module, *words, env=env, log=home / "logs" / name)
            return stack.enter_context(process).wait(seconds=500)

        controller = ["--controller", start("controller", "llava.serve.controller").url]
        start("worker", "tests.serve.scripted_worker", *controller)
        words = ["--api-key-file", str(home / "keys"), "--feedback-dir", str(home / "votes")]
        yield start("page", "llava.serve.gradio_web_server", *controller, *words).url


@pytest.fixture
def page(browser, page_url):
    """The page opened with the key, the notice accepted."""
    context = browser.new_context(http_credentials={"username": "nurse", "password": KEY})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(page_url)
    page.locator("#accept").click()
    playwright.expect(page.locator("#box textarea")).to_be_visible(timeout=PATIENCE)
    wait_until(lambda: page.locator("#model input").input_value() == "scripted", 120)
    yield page
    context.close()


def ask(page, text):
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")
    playwright.expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)
    answer = page.locator("#chat0 [data-testid=bot]").last
    playwright.expect(answer).to_contain_text("end-of-it", timeout=PATIENCE)
    playwright.expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)
    return answer


def test_images_of_an_answer_tell_nobody(page, browser, stack):
    with listener() as (address, asked):
        shown = [f"![x]({address}/markdown.png)", f"[![y]({address}/linked.png)]({address}/link)"]
        shown += [f"<img src='{address}/html.png'>", f"<video src='{address}/video'></video>", "end-of-it"]
        answer = ask(page, " ".join(shown))
        playwright.expect(answer.locator("img").first).to_be_attached(timeout=PATIENCE)
        page.wait_for_timeout(1000)
        assert asked == []
        # Without the policy the same image is asked for.
        open_page = browser.new_page()
        open_page.goto(f"{stack['open'].url}/page?{address}/markdown.png")
        wait_until(lambda: asked == ["/markdown.png"], 60)
        open_page.close()


def test_the_page_cannot_stand_in_another(page_url, stack, browser):
    context = browser.new_context(http_credentials={"username": "nurse", "password": KEY})
    page = context.new_page()
    page.goto(f"{stack['open'].url}/page?x")
    page.set_content(f"<iframe src='{page_url}'></iframe><iframe src='{stack['open'].url}/health'></iframe>")
    wait_until(lambda: len(page.frames) == 3, 60)
    refused, shown = (frame for frame in page.frames if frame.parent_frame)
    wait_until(lambda: "ok" in shown.content(), 60)
    page.wait_for_timeout(1000)
    assert refused.locator("#accept").count() == 0
    context.close()


def traces(folders, marks):
    """(file, mark) of each file below the folders that holds one of the marks."""
    files = files_below(*folders)
    return [(file, mark) for file, content in files.items() for mark in marks if mark in content]


def test_a_conversation_leaves_nothing(page, home, tmp_path):
    pixels = np.random.default_rng(7).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scan-of-a-patient.png")
    content = (tmp_path / "scan-of-a-patient.png").read_bytes()
    middle = content[200:260]
    marks = [WORDS.encode(), WORDS.encode("utf-16-le"), middle, b"scan-of-a-patient"]
    marks += [base64.b64encode(content[start : start + 60]) for start in (198, 199, 200)]
    folders = [home, *IN_MEMORY.glob("llava-web-*")]

    page.locator("#box input[type=file]").set_input_files([tmp_path / "scan-of-a-patient.png"])
    thumbnail = page.locator("#box").get_by_role("listitem", name="File thumbnail")
    playwright.expect(thumbnail).to_have_count(1, timeout=PATIENCE)
    assert traces(folders, [middle]), "the search would have found it"
    ask(page, f"What is shown? {WORDS} end-of-it")
    ask(page, f"And {WORDS}? end-of-it")
    page.locator("#again").click()
    playwright.expect(page.locator("#stop")).to_be_enabled(timeout=PATIENCE)
    playwright.expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)
    with page.expect_download(timeout=PATIENCE):
        page.locator("#export").click()
    wait_until(lambda: not traces(folders, marks[2:]), 30)
    assert traces(folders, marks) == []

    # Only a vote, which the page announces, keeps the text; never the image.
    page.locator("#vote-good").click()
    wait_until(lambda: traces([home / "votes"], marks[:1]), 60)
    assert {file.parent for file, _ in traces(folders, marks)} == {home / "votes"}
    assert not traces(folders, marks[2:])
