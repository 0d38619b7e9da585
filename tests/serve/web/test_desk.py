"""The web page's desk in a real browser: zoom and keys, refused files, cards of models."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from llava.serve.web.page import POLL_SECONDS
from tests.images.test_medical import dicom
from tests.serve.browsing import PATIENCE, accept, add_files, ask, choose, expect, last_answer, save, whole_answer
from tests.serve.processes import wait_until
from tests.serve.test_web_scans import series


def zoom(page) -> float:
    return float(page.locator("#viewer [data-zoom]").get_attribute("data-zoom"))


def place(page) -> list[float]:
    """x, y, width and height of the large image as it is drawn."""
    return page.evaluate(
        "(({x, y, width, height}) => [x, y, width, height])"
        "(document.querySelector('#viewer img.large').getBoundingClientRect())"
    )


def looked(page) -> str:
    return page.locator("#viewer [data-image][aria-pressed=true]").get_attribute("title")


def test_zoom_shift_and_keys(open_page, models, tmp_path):
    for name in ("one.png", "two.png"):
        Image.new("RGB", (300, 200), (90, 90, 90)).save(tmp_path / name)
    page = open_page()
    accept(page, "demo-model")
    add_files(page, [tmp_path / "one.png", tmp_path / "two.png"], 2)
    expect(page.locator("#viewer img.large")).to_have_count(1)
    whole = place(page)
    stage = page.locator("#viewer .stage").bounding_box()
    assert stage["height"] > 500 and stage["width"] > 600

    page.locator("[data-do=larger]").click()
    assert zoom(page) == pytest.approx(1.4) and place(page)[2] == pytest.approx(whole[2] * 1.4)
    # The wheel keeps what is under the pointer where it is.
    x, y = stage["x"] + 100, stage["y"] + 400
    before = place(page)
    share = [(x - before[0]) / before[2], (y - before[1]) / before[3]]
    page.mouse.move(x, y)
    page.mouse.wheel(0, -300)
    wait_until(lambda: zoom(page) > 2, 20)
    after = place(page)
    assert [after[0] + share[0] * after[2], after[1] + share[1] * after[3]] == pytest.approx([x, y], abs=1)
    page.mouse.down()
    page.mouse.move(x + 40, y + 30, steps=4)
    page.mouse.up()
    assert place(page)[:2] == pytest.approx([after[0] + 40, after[1] + 30], abs=1)
    page.mouse.dblclick(x, y)
    assert zoom(page) == 1 and place(page) == pytest.approx(whole)

    # In the question letters and arrows are the question's; with Alt, and elsewhere, they are the image's.
    box = page.locator("#box textarea")
    box.fill("m0")
    box.press("+")
    box.press("ArrowLeft")
    expect(box).to_have_value("m0+")
    assert zoom(page) == 1 and looked(page) == "Image 2"
    box.press("Alt+ArrowLeft")
    expect(page.locator("#viewer .words")).to_contain_text("Image 1 of 2")
    page.locator("[data-image='0']").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer .words")).to_contain_text("Image 2 of 2")
    page.keyboard.press("+")
    assert zoom(page) == pytest.approx(1.4)
    page.keyboard.press("-")
    page.keyboard.press("+")
    page.keyboard.press("0")
    assert zoom(page) == 1
    page.keyboard.press("m")
    expect(page.locator("#viewer img.large")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator("#viewer .words")).to_contain_text("Beside it: what demo-model sees")


def test_two_fingers_zoom_and_one_moves(open_page, models, tmp_path):
    """At a phone's width, with the browser's own touches."""
    Image.new("RGB", (300, 200), (90, 90, 90)).save(tmp_path / "one.png")
    page = open_page(390, 844)
    accept(page, "demo-model")
    add_files(page, [tmp_path / "one.png"], 1)
    expect(page.locator("#viewer img.large")).to_have_count(1)
    stage, whole = page.locator("#viewer .stage").bounding_box(), place(page)
    x, y = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    touches = page.context.new_cdp_session(page)
    touches.send("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})

    def touch(kind, *points):
        places = [{"x": px, "y": py, "id": number} for number, (px, py) in enumerate(points)]
        touches.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    touch("touchStart", (x - 20, y), (x + 20, y))
    for apart in (25, 30, 35, 40):
        touch("touchMove", (x - apart, y), (x + apart, y))
    touch("touchEnd")
    wait_until(lambda: zoom(page) > 1, 20)
    assert zoom(page) == pytest.approx(2, abs=0.05) and place(page)[2] == pytest.approx(2 * whole[2], rel=0.03)
    assert page.evaluate("window.visualViewport.scale") == 1, "the page itself isn't zoomed"
    before = place(page)
    touch("touchStart", (x, y))
    touch("touchMove", (x + 10, y + 5))
    touch("touchMove", (x + 30, y + 20))
    touch("touchEnd")
    wait_until(lambda: place(page) != before, 20)
    assert place(page)[:2] == pytest.approx([before[0] + 30, before[1] + 20], abs=1)


def test_slices_by_keys_and_wheel(open_page, models, tmp_path):
    page = open_page()
    accept(page, "demo-model")
    add_files(page, series(tmp_path), 1)
    number = page.locator("#scan-place input[type=number]")
    expect(number).to_have_value("20", timeout=PATIENCE)
    page.locator("[data-image='0']").focus()
    page.keyboard.press("ArrowDown")
    expect(number).to_have_value("21")
    before = page.locator("#viewer img.large").get_attribute("src")
    page.mouse.move(300, 400)
    page.mouse.wheel(0, 240)
    expect(number).to_have_value("27")
    wait_until(lambda: page.locator("#viewer img.large").get_attribute("src") != before, 60)
    assert zoom(page) == 1
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    wait_until(lambda: zoom(page) > 1, 20)
    expect(number).to_have_value("27")


def test_a_new_answer_is_in_view_on_a_phone(open_page, models, tmp_path):
    Image.new("RGB", (300, 200), (90, 90, 90)).save(tmp_path / "one.png")
    page = open_page(390, 844)
    accept(page, "demo-model")
    add_files(page, [tmp_path / "one.png"], 1)
    for question in ("What is this?", "And what is that, which is beside it or below it or around it or above it?"):
        ask(page, question)
        whole_answer(page, question[-7:])
        answer, image = last_answer(page).bounding_box(), page.locator("#viewer .stage").bounding_box()
        assert image["y"] + image["height"] <= answer["y"]
        assert answer["y"] + answer["height"] <= page.locator("#box").bounding_box()["y"]


@pytest.mark.parametrize("width", [1280, 1024, 390])
def test_the_windows_controls_fill_their_box(open_page, models, tmp_path, width):
    page = open_page(width)
    accept(page, "demo-model")
    add_files(page, series(tmp_path), 1)
    expect(page.locator("#scan-width")).to_be_visible(timeout=PATIENCE)
    box = page.locator("#scan-window .form").bounding_box()
    rows: dict[int, float] = {}
    for name in ("preset", "centre", "width"):
        one = page.locator(f"#scan-{name}").bounding_box()
        rows[round(one["y"])] = rows.get(round(one["y"]), 0) + one["width"]
    assert all(covered == pytest.approx(box["width"], abs=6) for covered in rows.values()), rows


def test_editing_keeps_what_was_typed_and_added_meanwhile(open_page, models, tmp_path):
    for name, size in (("asked.png", 30), ("new.png", 40)):
        Image.new("RGB", (size, size), (size, 90, 90)).save(tmp_path / name)
    page = open_page()
    accept(page, "demo-model")
    add_files(page, [tmp_path / "asked.png"], 1)
    ask(page, "What is this?")
    expect(last_answer(page)).to_contain_text("this?", timeout=PATIENCE)
    add_files(page, [tmp_path / "new.png"], 2)
    page.locator("#box textarea").fill("And what is the new one?")
    page.locator("#edit").click()
    both = "What is this?\nAnd what is the new one?"
    expect(page.locator("#box textarea")).to_have_value(both, timeout=PATIENCE)
    expect(page.locator("#draft")).to_contain_text("With your next question: 2 images.", timeout=PATIENCE)
    expect(page.locator("#viewer [data-image]")).to_have_count(2)
    ask(page, "And both?")
    whole_answer(page, "both?")
    (turn,) = json.loads(save(page))["turns"]
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("asked.png", "new.png")]
    assert turn["images"] == [f"sha256:{digest}" for digest in digests]


def test_a_refused_file_holds_the_question(open_page, models, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no image" * 9)
    (tmp_path / "broken.dcm").write_bytes(dicom(np.zeros((9, 9), np.uint16))[:300])
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate((32 << 20) + 1)
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    page = open_page()
    accept(page, "demo-model")
    box, refused = page.locator("#box textarea"), page.locator("#refused [role=alert]")
    for name, words in (("broken.png", "broken.png"), ("broken.dcm", "Refused"), ("large.png", "larger than 32 MiB")):
        page.locator("#box input[type=file]").set_input_files([tmp_path / name])
        expect(refused).to_contain_text(words, timeout=PATIENCE)
        ask(page, f"What is in {name}?")
        expect(page.get_by_text("A file was refused: add another one, or go on without it.").last).to_be_visible()
        expect(box).to_have_value(f"What is in {name}?")
        expect(page.locator("#chat0 [data-testid=user]")).to_have_count(0)
        page.locator("#refused button").click()
        expect(refused).to_have_count(0, timeout=PATIENCE)

    # Another file, which is taken, is an answer too.
    page.locator("#box input[type=file]").set_input_files([tmp_path / "broken.png"])
    expect(refused).to_have_count(1, timeout=PATIENCE)
    add_files(page, [tmp_path / "good.png"], 1)
    expect(refused).to_have_count(0, timeout=PATIENCE)
    ask(page, "And now?")
    expect(last_answer(page)).to_contain_text("now?", timeout=PATIENCE)
    expect(page.locator("#chat0 [data-testid=user] img.thumb")).to_have_count(1, timeout=PATIENCE)
    page.wait_for_timeout(300)


def test_files_that_the_server_refuses_hold_the_question(open_page, models, tmp_path):
    """Each is small enough; together they are more than a visitor may have there."""
    for number in range(5):
        with (tmp_path / f"{number}.png").open("wb") as file:
            file.truncate(30 << 20)
    page = open_page(refusals=[413])
    accept(page, "demo-model")
    page.locator("#box input[type=file]").set_input_files([tmp_path / f"{number}.png" for number in range(5)])
    refused = page.locator("#refused [role=alert]")
    expect(refused).to_contain_text("You have more than 128 MiB of files here.", timeout=PATIENCE)
    ask(page, "What is in them?")
    expect(page.get_by_text("A file was refused: add another one, or go on without it.").last).to_be_visible()
    expect(page.locator("#chat0 [data-testid=user]")).to_have_count(0)
    page.locator("#refused button").click()
    expect(refused).to_have_count(0, timeout=PATIENCE)
    ask(page, "And without them?")
    expect(last_answer(page)).to_contain_text("without them?", timeout=PATIENCE)


def test_the_card_of_the_chosen_model(open_page, models):
    page = open_page()
    accept(page, "demo-model")
    about = page.locator("#drawer-about")
    expect(about).to_be_hidden()
    page.locator("#open-about").click()
    expect(about.locator("h2")).to_have_text("demo-model")
    expect(about).to_contain_text("It knows drawn images only.")
    expect(about).to_contain_text("2,048 tokens")
    expect(about).to_contain_text("For research only. Not a medical device")
    page.keyboard.press("Escape")
    expect(about).to_be_hidden()
    expect(page.locator("#open-about")).to_be_focused()
    expect(page.locator("#examples [data-example]")).to_have_count(3)

    choose(page, "#model", "other-model")
    expect(page.locator("#name0")).to_have_text("other-model", timeout=PATIENCE)
    expect(page.locator("#examples [data-example]")).to_have_count(0, timeout=PATIENCE)
    page.locator("#open-about").click()
    expect(about).to_contain_text("PMC figures")
    expect(about).not_to_contain_text("drawn images only")


def test_a_ready_model_is_found_when_the_notice_is_accepted(open_page, models):
    """Not only at the next look, until which the page would say that there is none."""
    page = open_page()
    page.add_init_script(
        "const every = window.setInterval;"
        f"window.setInterval = (what, ms, ...words) => every(what, ms === {POLL_SECONDS * 1000} ? 1e9 : ms, ...words);"
    )
    page.reload()
    page.locator("#accept").click()
    expect(page.locator("#box textarea")).to_be_visible(timeout=60_000)
    expect(page.locator("#model input")).to_have_value("demo-model", timeout=60_000)
    assert page.locator("#waiting").count() == 0
