"""The whole life of a conversation on the web page, at three widths, light and dark, with axe-core's findings."""

import json

import pytest
from PIL import Image

from llava.serve.web.parts.examples import draw_example
from tests.serve.browsing import (
    PATIENCE,
    accept,
    add_files,
    ask,
    choose,
    expect,
    last_answer,
    save,
    screenshot,
    whole_answer,
)
from tests.serve.processes import wait_until
from tests.serve.test_web_scans import SLICES, series
from tests.serve.web.accessibility import findings

SIZES = {1440: 900, 1024: 768, 390: 844}
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


class Composer:
    """The question's box: it has to stay where it is."""

    def __init__(self, page):
        self.page = page
        self.expected = self.place()

    def place(self):
        box = self.page.locator("#box").bounding_box()
        return [round(box[key]) for key in ("x", "y", "width", "height")]

    def check(self):
        assert self.place() == self.expected
        page = self.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        size = self.page.viewport_size
        assert page[0] <= size["width"] and page[1] <= size["height"], "the page scrolls"
        assert self.expected[1] + self.expected[3] <= size["height"], "the question is out of view"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
def test_a_conversation(open_page, models, tmp_path, width, scheme):
    (tmp_path / "photo.png").write_bytes(draw_example("tissue"))
    page = open_page(width, SIZES[width], scheme)
    expect(page.locator("#accept")).to_be_visible(timeout=PATIENCE)
    assert findings(page) == []
    print(f"\nfirst contentful paint at {width} px, {scheme}: {page.evaluate(FIRST_PAINT):.0f} ms")
    accept(page, "demo-model")
    expect(page.locator("#examples [data-example]")).to_have_count(3, timeout=PATIENCE)
    composer = Composer(page)
    assert findings(page) == []

    add_files(page, [tmp_path / "photo.png", *series(tmp_path)], 2)
    expect(page.locator("#scan-place input[type=number]")).to_have_value(str(SLICES // 2), timeout=PATIENCE)
    composer.check()
    ask(page, "Is there a nodule in the lung, and what is beside it?")
    expect(last_answer(page)).to_contain_text("echo:", timeout=PATIENCE)
    composer.check()
    whole_answer(page, "beside it?")
    composer.check()
    assert findings(page) == []

    choose(page, "#other", "other-model")
    expect(page.locator("#name1")).to_have_text("other-model", timeout=PATIENCE)
    expect(page.locator("#pane1")).to_have_count(1, timeout=PATIENCE)
    page.wait_for_timeout(300)
    composer.expected = composer.place()
    ask(page, "What do both of you see?")
    for side in (0, 1):
        whole_answer(page, "you see?", side)
    page.locator("#attention").click()
    token = last_answer(page, 1).locator(".tok").last
    token.hover(timeout=PATIENCE)
    expect(page.locator(".looked")).to_contain_text("“see?”: 50.0% of its attention went to images")
    expect(page.locator(".maps canvas")).to_have_count(2)
    stage, words = page.locator("#viewer .stage").bounding_box(), token.bounding_box()
    assert stage["height"] >= 250 and stage["y"] >= 0, "the image is in view while a word is pointed at"
    assert words["y"] >= stage["y"] + stage["height"] or words["x"] >= stage["x"] + stage["width"]
    composer.check()
    assert findings(page) == []
    screenshot(page, f"web_desk_{width}_{scheme}")
    page.locator("#box").hover()

    for drawer in ("about", "settings", "files"):
        page.locator(f"#open-{drawer}").click()
        expect(page.locator(f"#drawer-{drawer}")).to_be_visible()
        assert findings(page) == []
        page.keyboard.press("Escape")
    data, shown = json.loads(save(page)), save(page, "export-page")
    composer.check()
    page.locator("#clear").click()
    expect(page.locator("#viewer [data-image]")).to_have_count(0, timeout=PATIENCE)
    reopen_and_go_on(page, tmp_path, data, shown)


def reopen_and_go_on(page, folder, data, shown):
    (folder / "conversation.html").write_text(shown)
    page.locator("#box input[type=file]").set_input_files([folder / "conversation.html"])
    expect(page.locator("#chat0 [data-testid=user]")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator("#viewer [data-image]")).to_have_count(2, timeout=PATIENCE)
    ask(page, "And now?")
    whole_answer(page, "now?")
    again = json.loads(save(page))
    wait_until(lambda: page.locator("#drawer-files").is_hidden(), 20)
    for before, after in zip(data["turns"], again["turns"], strict=False):
        assert {**after, "image_options": None} == {**before, "image_options": None}
    (photo, scan) = again["turns"][0]["image_options"]
    assert set(photo) == {"reopened"} and scan["slice"] == SLICES // 2 and scan["of"] == SLICES
    assert len(again["turns"]) == 3 and again["turns"][2]["question"] == "And now?"


def test_an_exported_page_stands_alone(open_page, browser, models, tmp_path):
    """It holds images, dates, models and sampling, passes axe-core, and names no patient."""
    page = open_page()
    accept(page, "demo-model")
    add_files(page, series(tmp_path), 1)
    ask(page, "What is <i>this</i>?")
    whole_answer(page, "this?")
    text = save(page, "export-page")
    assert "Musterfrau" not in text and "PAT-55119" not in text and "<i>this" not in text
    (tmp_path / "page.html").write_text(text)
    for width, scheme in ((1200, "light"), (390, "dark")):
        shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        asked, said = [], []
        shown.on("request", lambda request, asked=asked: asked.append(request.url))
        shown.on("console", lambda message, said=said: said.append(message.text))
        shown.goto((tmp_path / "page.html").as_uri())
        for words in ("demo-model", "sha256", "slice 20", "window 40/400", "What is <i>this</i>?"):
            expect(shown.locator("main")).to_contain_text(words)
        assert shown.evaluate("document.querySelector('main img').naturalWidth") == 160
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert findings(shown) == [] and said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        shown.close()


def test_speed_is_shown_on_request(open_page, models, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    page = open_page()
    accept(page, "demo-model")
    ask(page, "How fast is it?")
    whole_answer(page, "fast is it?")
    expect(last_answer(page)).not_to_contain_text("tokens/s")
    page.locator("#open-settings").click()
    page.locator("#speed").get_by_role("checkbox").check()
    expect(last_answer(page)).to_contain_text("s to the first word")
    expect(last_answer(page)).to_contain_text("tokens/s")
