"""In a real browser: an answer's images make no request to others, and a whole conversation leaves nothing behind
(row 12)."""

import base64
import secrets
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from llava.records import iter_records
from tests.security.page_visitor import listener
from tests.serve.browsing import CHROMIUM, PATIENCE, answer_again, last_answer, whole_answer
from tests.serve.processes import Process, files_below, wait_until
from tests.tiny import make_llava

playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install it or set LLAVA_CHROMIUM")

KEY = "key-of-the-ward"
WORDS = f"Frau Musterfrau, geboren am 1.2.1934 ({secrets.token_hex(8)})"  # in no other test's files
IN_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where the servers of this file may write: each has a folder with its home, temporary files and log."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "keys").touch(0o600)
    (folder / "keys").write_text(f"ward {KEY}\n")
    return folder


@pytest.fixture(scope="module")
def servers(home, tmp_path_factory):
    """Page and API with keys, the page with votes too; a worker that repeats what it is asked, and one with a model."""
    started: dict[str, Process] = {}
    with ExitStack() as stack:

        def start(name, module, *words):
            (home / name / "tmp").mkdir(parents=True)
            env = {"LLAVA_SERVE_SECRET": "s3cret", "HOME": str(home / name), "TMPDIR": str(home / name / "tmp")}
            env |= {"XDG_CACHE_HOME": str(home / name / "cache"), "OMP_NUM_THREADS": "1"}
            started[name] = stack.enter_context(Process(module, *words, env=env, log=home / name / "log"))

        start("controller", "llava.serve.controller")
        controller = ["--controller", started["controller"].url]
        start("scripted", "tests.serve.scripted_worker", *controller)
        model = ["--model-path", str(make_llava(tmp_path_factory.mktemp("model"))), "--model-name", "tiny"]
        start("model", "llava.serve.model_worker", *controller, *model, "--device", "cpu")
        keys = ["--api-key-file", str(home / "keys")]
        start("api", "llava.serve.openai_api_server", *controller, *keys)
        start("page", "llava.serve.gradio_web_server", *controller, *keys, "--feedback-dir", str(home / "votes"))
        for process in started.values():
            process.wait(seconds=500)
        yield started


@pytest.fixture(scope="module")
def page_url(servers):
    return servers["page"].url


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
    whole_answer(page, "end-of-it")
    return last_answer(page)


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


def choose_second(page, model):
    page.locator("#other input").click()
    page.get_by_role("option", name=model).click()


def ask_api(url, model, text, image, stream):
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(image).decode()}}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    body = {"model": model, "messages": messages, "stream": stream, "max_tokens": 8}
    reply = httpx.post(url + "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=240)
    assert reply.status_code == 200 and "error" not in reply.text, reply.text


def traces(folders, marks):
    """(file, mark) of each file below the folders that holds one of the marks."""
    files = files_below(*folders)
    return [(file, mark) for file, content in files.items() for mark in marks if mark in content]


def assert_found(folders, marks):
    """The search finds each mark in each folder."""
    for folder in folders:
        left = folder / "left-behind"
        left.write_bytes(b" and ".join(marks))
        assert [mark for file, mark in traces([folder], marks) if file == left] == marks
        left.unlink()


def test_a_conversation_leaves_nothing(page, servers, home, tmp_path):
    """Neither with the page nor with the API, neither where an image is only passed on nor where a model sees it."""
    pixels = np.random.default_rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scan-of-a-patient.png")
    content = (tmp_path / "scan-of-a-patient.png").read_bytes()
    middle = content[200:260]
    marks = [WORDS.encode(), WORDS.encode("utf-16-le"), middle, pixels[30].tobytes(), b"scan-of-a-patient"]
    marks += [base64.b64encode(content[start : start + 60]) for start in (198, 199, 200)]
    folders = [home, *IN_MEMORY.glob("llava-web-*")]
    assert_found([IN_MEMORY, *(home / name / folder for name in servers for folder in ("", "tmp"))], marks)
    before = set(files_below(home))

    page.locator("#box input[type=file]").set_input_files([tmp_path / "scan-of-a-patient.png"])
    playwright.expect(page.locator("#viewer img.large")).to_have_count(1, timeout=PATIENCE)
    choose_second(page, "tiny")
    ask(page, f"What is shown? {WORDS} end-of-it")
    page.locator("#box textarea").fill(f"And {WORDS}? hold")
    page.locator("#box textarea").press("Enter")
    playwright.expect(last_answer(page)).to_contain_text("hold", timeout=PATIENCE)
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)
    answer_again(page)
    page.locator("#open-files").click()
    for form in ("#export", "#export-page"):
        with page.expect_download(timeout=PATIENCE):
            page.locator(form).click()
    page.keyboard.press("Escape")
    for model in ("scripted", "tiny"):
        for stream in (False, True):
            ask_api(servers["api"].url, model, f"And {WORDS}?", content, stream)
    wait_until(lambda: not traces(folders, marks[2:]), 30)
    assert traces([home, IN_MEMORY], marks) == []
    assert set(files_below(home)) == before

    # Only a vote, which the page announces, keeps the text; never the image.
    page.locator("#vote-good").click()
    wait_until(lambda: traces([home / "votes"], marks[:1]), 60)
    assert {file.parent for file, _ in traces(folders, marks)} == {home / "votes"}
    assert not traces(folders, marks[2:])
    (vote,) = (record for path in (home / "votes").glob("*.jsonl") for record in iter_records(path))
    # The small model's context ends within the second question.
    answers = [(answer["model"], answer["whole"]) for answer in vote["turns"][0]["answers"]]
    assert answers == [("scripted", True), ("tiny", True)]
