"""The web page in Chromium, for the tests of it: servers, browser and what a visitor does.

LLAVA_SCREENSHOT_DIR keeps images of the page (docs/images holds those of the last release).
"""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from llava.data.phantoms import ABOUT
from tests.serve.processes import Process, wait_until

CHROMIUM = os.environ.get("LLAVA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")

ENV = {"LLAVA_SERVE_SECRET": "s3cret"}
SECRET = {"x-llava-secret": "s3cret"}
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
PATIENCE = 240_000  # ms; a slow machine is no failure


@pytest.fixture(scope="module")
def controller():
    with Process("llava.serve.controller", env=ENV) as process:
        yield process.wait()


@pytest.fixture(scope="module")
def web(controller, tmp_path_factory):
    """The page's server, started before any worker; `votes` is where its feedback goes."""
    votes = tmp_path_factory.mktemp("votes")
    words = ["--controller", controller.url, "--feedback-dir", str(votes)]
    log = tmp_path_factory.mktemp("web") / "log"
    with Process("llava.serve.gradio_web_server", *words, env=ENV, log=log) as process:
        process.votes = votes
        yield process.wait(seconds=500)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here; install it or set LLAVA_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, web):
    """Open the page with a given width; afterwards no error was on the console and nothing outside was asked for.

    `refusals`: HTTP statuses that the browser may report as errors, as it does for every refused request.
    """
    seen = {"errors": [], "hosts": set()}
    pages = []

    def opened(width=1280, height=900, scheme="light", refusals=()):
        def note(message):
            if message.type == "error" and not any(f"status of {status} " in message.text for status in refusals):
                seen["errors"].append(message.text)

        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)
        page.on("console", note)
        page.on("pageerror", lambda error: seen["errors"].append(str(error)))
        page.on("request", lambda request: seen["hosts"].add(urlsplit(request.url).hostname))
        page.goto(web.url)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert seen["errors"] == []
    assert seen["hosts"] <= {"127.0.0.1", None, ""}


def worker(controller, name, pause="0.05", trained_on=ABOUT):
    """A scripted worker; by its card it is a model of the demo, so that the page has examples."""
    words = ["--controller", controller.url, "--model-name", name, "--pause", pause, "--trained-on", trained_on]
    words += ["--names-images", "False"]
    return Process("tests.serve.scripted_worker", *words, env=ENV)


def ask(page, text):
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")


def last_answer(page, side=0):
    return page.locator(f"#chat{side} [data-testid=bot]").last


def whole_answer(page, text, side=0):
    """Until the last answer holds `text`, with which it ends, and the page takes it for whole."""
    expect(last_answer(page, side)).to_contain_text(text, timeout=PATIENCE)
    expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)


def answer_again(page):
    """Makes the last answer anew; its question ends with `hold`, so that the page is seen at it, and is stopped."""
    page.locator("#again").click()
    expect(page.locator("#stop")).to_be_enabled(timeout=PATIENCE)
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)


def expect(locator):
    from playwright import sync_api

    return sync_api.expect(locator)


def screenshot(page, name):
    """Where they are kept; a menu that was closed fades for a while, so it is waited for."""
    if folder := os.environ.get("LLAVA_SCREENSHOT_DIR"):
        expect(page.locator("[role=option]")).to_have_count(0, timeout=PATIENCE)
        page.screenshot(path=Path(folder) / f"{name}.png")


def running(process):
    return httpx.post(process.url + "/worker_get_status", headers=SECRET).json()["stats"]["running"]


def choose(page, dropdown, name):
    page.locator(f"{dropdown} input").click()
    page.get_by_role("option", name=name).click()


def accept(page, model=None):
    """Past the notice, to the question's box; `model` is waited for."""
    page.locator("#accept").click()
    expect(page.locator("#box textarea")).to_be_visible(timeout=PATIENCE)
    if model:
        wait_until(lambda: page.locator("#model input").input_value() == model, 120)


def add_files(page, paths, images):
    """Through the paper clip, until the strip has so many images."""
    page.locator("#box input[type=file]").set_input_files(paths)
    expect(page.locator("#viewer [data-image]")).to_have_count(images, timeout=PATIENCE)


def save(page, form="export") -> str:
    """The text of an export."""
    if not page.locator(f"#{form}").is_visible():
        page.locator("#open-files").click()
    with page.expect_download(timeout=PATIENCE) as download:
        page.locator(f"#{form}").click()
    page.keyboard.press("Escape")
    return Path(download.value.path()).read_text()
