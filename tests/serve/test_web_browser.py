"""The web page in a real browser: accept, upload, ask, watch it stream, stop, regenerate, compare, export."""

import hashlib
import json
from contextlib import ExitStack

import numpy as np
from PIL import Image

from llava.serve.web.parts.examples import draw_example
from tests.images.test_medical import PATIENT, dicom
from tests.serve.browsing import (
    ENV,
    PATIENCE,
    accept,
    add_files,
    answer_again,
    ask,
    choose,
    expect,
    last_answer,
    running,
    save,
    screenshot,
    whole_answer,
    worker,
)
from tests.serve.processes import Process, wait_until


def test_the_whole_visit(open_page, controller, web, tmp_path):
    page = open_page()
    expect(page.locator("#notice")).to_contain_text("not a medical device", timeout=PATIENCE)
    expect(page.locator("#box")).to_have_count(0)
    screenshot(page, "web_notice")
    page.locator("#accept").click()
    expect(page.locator("#waiting")).to_contain_text("No model is ready yet", timeout=PATIENCE)
    screenshot(page, "web_waiting")
    with ExitStack() as stack:
        # One after the other: the page takes the model that is there first.
        first = stack.enter_context(worker(controller, "first-model")).wait()
        expect(page.locator("#box textarea")).to_be_visible(timeout=PATIENCE)
        second = stack.enter_context(worker(controller, "second-model")).wait()
        expect(page.locator("#waiting")).to_have_count(0, timeout=PATIENCE)

        (tmp_path / "photo.png").write_bytes(draw_example("chest"))
        (tmp_path / "slice.dcm").write_bytes(dicom(np.arange(160 * 200, dtype=np.uint16).reshape(160, 200)))
        add_files(page, [tmp_path / "photo.png", tmp_path / "slice.dcm"], 2)
        expect(page.locator("#draft")).to_contain_text("With your next question: 2 images")
        expect(page.locator("#box").get_by_role("listitem", name="File thumbnail")).to_have_count(0, timeout=PATIENCE)
        ask(page, "What is <b>shown</b> here?")
        expect(last_answer(page)).to_contain_text("echo:", timeout=PATIENCE)
        whole_answer(page, "here?")
        expect(page.locator("#chat0 [data-testid=user] img.thumb")).to_have_count(2, timeout=PATIENCE)
        expect(page.locator("#chat0 [data-testid=user]").last).to_contain_text("<b>shown</b>", timeout=PATIENCE)
        screenshot(page, "web_answer")

        page.locator("#attention").click()
        tokens = last_answer(page).locator(".tok")
        expect(tokens).to_have_count(5, timeout=PATIENCE)
        expect(page.locator(".looked")).to_contain_text("Point at a word")
        tokens.nth(3).hover()
        expect(page.locator(".looked")).to_contain_text("Token 4 of 5, “<b>shown</b>”: 50.0% of its attention")
        expect(page.locator(".looked")).to_contain_text("the brightest patch got 25.00%")
        expect(page.locator(".maps canvas")).to_have_count(2)
        page.locator("#box").hover()
        expect(page.locator(".maps canvas")).to_have_count(0)
        tokens.nth(3).click()
        page.locator("#box").hover()
        expect(page.locator(".looked")).to_contain_text("Token 4 of 5")
        page.keyboard.press("ArrowRight")
        expect(page.locator(".looked")).to_contain_text("Token 5 of 5, “here?”")
        screenshot(page, "web_look")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")

        ask(page, "go on and be slow")
        expect(page.locator(".tok")).to_have_count(0, timeout=PATIENCE)
        expect(page.locator("#stop")).to_be_enabled(timeout=PATIENCE)
        expect(last_answer(page)).to_contain_text("slow", timeout=PATIENCE)
        page.keyboard.press("Escape")
        expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)
        wait_until(lambda: running(first) + running(second) == 0, 20)
        stopped = last_answer(page).inner_text()
        assert 0 < stopped.count("slow") < 50

        ask(page, "now hold")
        expect(last_answer(page)).to_contain_text("now hold", timeout=PATIENCE)
        ask(page, "too early")
        expect(page.get_by_text("still being answered")).to_be_visible(timeout=PATIENCE)
        expect(page.locator("#box textarea")).to_have_value("too early", timeout=PATIENCE)
        page.locator("#edit").click()
        expect(page.locator("#box textarea")).to_have_value("now hold\ntoo early", timeout=PATIENCE)
        ask(page, "shorter hold")
        expect(last_answer(page)).to_contain_text("shorter hold", timeout=PATIENCE)
        page.keyboard.press("Escape")
        expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)
        answer_again(page)
        expect(page.locator("#chat0 [data-testid=user]")).to_have_count(3, timeout=PATIENCE)

        choose(page, "#other", "second-model")
        ask(page, "both of you")
        for side in (0, 1):
            whole_answer(page, "both of you", side)
        screenshot(page, "web_side_by_side")

        ask(page, "now oom")
        whole_answer(page, "out of memory")
        expect(last_answer(page)).to_contain_text("req-", timeout=PATIENCE)
        screenshot(page, "web_error")

        page.locator("#vote-left").click()
        wait_until(lambda: any(path.stat().st_size for path in web.votes.glob("*.jsonl")), 60)
        (file,) = web.votes.glob("*.jsonl")
        assert file.stat().st_mode & 0o777 == 0o600
        vote = json.loads(file.read_text())
        assert vote["vote"] == "left" and vote["turns"][0]["images"][0].startswith("sha256:")
        assert "base64" not in file.read_text() and "127.0.0.1" not in file.read_text()

        exported = json.loads(save(page))
        assert [turn["question"] for turn in exported["turns"]][-1] == "now oom"
        assert [answer["model"] for answer in exported["turns"][3]["answers"]] == ["first-model", "second-model"]

        page.locator("#clear").click()
        expect(page.locator("#chat0 [data-testid=bot]")).to_have_count(0, timeout=PATIENCE)
    assert PATIENT not in web.log.read_text()


def test_a_phone(open_page, controller):
    with worker(controller, "phone-model") as process:
        process.wait()
        page = open_page(width=390, height=844)
        accept(page, "phone-model")
        page.locator("#example-chest").click()
        expect(page.locator("#viewer img.large")).to_have_count(1, timeout=PATIENCE)
        page.locator("#box textarea").press("Enter")
        expect(last_answer(page)).to_contain_text("finding?", timeout=PATIENCE)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "scrolls sideways"
        expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)
        expect(page.locator("#exported")).to_be_hidden()
        screenshot(page, "web_phone")
        ask(page, "slow")
        wait_until(lambda: running(process) == 1, 60)
        page.close()
        wait_until(lambda: running(process) == 0, 60)


def test_a_visitor_is_told_of_the_conversation_log(browser, controller, tmp_path):
    """Before the first question, within the notice that is accepted, and as long as the page is open."""
    kept = tmp_path / "kept"
    words = ["--controller", controller.url, "--conversation-log", str(kept), "--conversation-log-days", "5"]
    with Process("llava.serve.gradio_web_server", *words, env=ENV) as web, worker(controller, "some-model") as process:
        process.wait()
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(web.wait(seconds=500).url)
        said = "What is asked and answered here is kept on this server for 5 days"
        expect(page.locator("#notice")).to_contain_text(said, timeout=PATIENCE)
        expect(page.locator("#notice")).to_contain_text("not a medical device")
        screenshot(page, "web_notice_log")
        assert not list(kept.glob("*.jsonl"))
        page.locator("#accept").click()
        expect(page.locator("#kept")).to_contain_text(said, timeout=PATIENCE)
        expect(page.locator("#kept")).to_be_visible()
        wait_until(lambda: page.locator("#model input").input_value() == "some-model", 120)
        page.locator("#box textarea").fill("Is it kept?")
        page.locator("#example-chest").click()
        expect(page.locator("#viewer img.large")).to_have_count(1, timeout=PATIENCE)
        expect(page.locator("#box textarea")).to_have_value("Is it kept?")  # not the card's own question
        page.locator("#box textarea").press("Enter")
        expect(last_answer(page)).to_contain_text("kept?", timeout=PATIENCE)
        wait_until(lambda: list(kept.glob("*.jsonl")), 60)
        (path,) = kept.glob("*.jsonl")
        (record,) = (json.loads(line) for line in path.read_text().splitlines())
        image, question = record["messages"][0]["content"]
        assert image["image_url"]["url"] == "sha256:" + hashlib.sha256(draw_example("chest")).hexdigest()
        assert question["text"] == "Is it kept?" and "kept?" in record["answer"] and record["end"] == "stop"
        assert path.stat().st_mode & 0o777 == 0o600 and kept.stat().st_mode & 0o777 == 0o700
        assert "base64" not in path.read_text() and "127.0.0.1" not in path.read_text()
        page.close()


MENU = """<ul role="listbox"><li role="option" style="background: red; height: 99px">one</li></ul>
<script>setTimeout(() => document.querySelector("ul").remove(), 1500)</script>"""


def test_no_picture_shows_a_menu_that_was_closed(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_SCREENSHOT_DIR", str(tmp_path))
    page = browser.new_page()
    page.set_content(MENU)
    screenshot(page, "page")
    page.close()
    assert np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).min() == 255
