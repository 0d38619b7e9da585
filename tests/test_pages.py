"""Pages hold everything themselves, whoever wrote the text on them, and their figures say what they show."""

import re
from types import SimpleNamespace

import pytest
from markupsafe import Markup
from PIL import Image

from llava.constants import RESEARCH_NOTICE
from llava.errors import LlavaError
from llava.eval.reports.tables import markdown_table
from llava.pages import (
    Card,
    figure,
    figures,
    folded,
    gallery,
    note,
    picture,
    preformatted,
    print_page,
    printing_browser,
    subheading,
    table,
    warning,
    write_page,
)
from llava.pages.charts import INK, Line, bars, curves, reliability
from tests.serve.browsing import CHROMIUM
from tests.serve.web.accessibility import findings

EVIL = '<script>alert("1")</script> & <img src="http://outside/x.png">'


def drawn():
    bins = [
        SimpleNamespace(confidence=0.55, accuracy=0.5, count=3),
        SimpleNamespace(confidence=0.9, accuracy=1, count=9),
    ]
    return [
        bars(EVIL, [(EVIL, 64.39, 57.0, 71.0), ("none", None, None, None), ("all", 100.0, None, None)]),
        reliability(EVIL, bins),
        curves(EVIL, [Line("first", [1, 2, 3], [2.0, 1.5, 1.0]), Line(EVIL, [1], [3.0])], "step", "loss"),
    ]


@pytest.mark.parametrize("name", ["$$", "_$^$", "cost of $5 or $6", "$\\\\input{x}$"])
def test_a_name_is_no_formula(name):
    assert f"{name}</text>" in bars("title", [(name, 50.0, 40.0, 60.0)])


def test_a_cell_of_markdown_is_text():
    shown = markdown_table(["model"], [["a|b"], ["<img src=x>"], ["![x](http://outside)"], ["two\nlines"]])
    assert shown.splitlines()[2:] == ["| a\\|b |", "| &lt;img src=x> |", "| ![x]\\(http://outside) |", "| two lines |"]


def everything(path):
    card = Card(Image.new("RGB", (64, 48), "red"), EVIL, EVIL, EVIL, right=False)
    parts = [
        table([EVIL, "n"], [[EVIL, "1.5"], ["-", "−2"]], ["published", ""]),
        gallery([card, Card(None, "q", "r", "a", right=True)]),
        gallery([card, Card(None, "q", "r", "a", right=True, kind=EVIL), Card(None, "q", "r", "a", True, "k")]),
        warning(EVIL),
        picture("data:image/png;base64,iVBORw0KGgo=", EVIL),
        preformatted(["a", "  " + EVIL]),
        note(EVIL),
        folded(EVIL, preformatted([EVIL])),
        subheading(EVIL),
    ]
    shown = figures(*(figure(one, f"{EVIL} {number}") for number, one in enumerate(drawn())))
    sections = [(EVIL, Markup().join(parts)), ("left out", Markup()), ("Figures", shown)]
    return write_page(path, EVIL, EVIL, sections).read_text(encoding="utf-8")


def test_text_of_others_is_escaped_everywhere(tmp_path):
    html = everything(tmp_path / "page.html")
    assert html.count("&lt;script&gt;") > 15 and "<script" not in html
    assert not re.search(r'<[^>]*\s(?:src|href)="(?!data:|#)|url\((?!#)', html)
    assert re.search(r"http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'", html)


def test_notice_on_top_and_empty_sections_left_out(tmp_path):
    html = everything(tmp_path / "page.html")
    assert RESEARCH_NOTICE in html.partition("<body>")[2].partition("<h1>")[0]
    assert html.count("<section") == html.count('<a href="#s') == 2 and "left out" not in html
    assert '<tr class="published">' in html and '<td class="n">−2</td>' in html and "<td>-</td>" in html


@pytest.mark.parametrize("number", range(3))
def test_figures_take_the_colours_of_the_page_and_say_what_they_show(number):
    svg = drawn()[number]
    assert svg.startswith('<svg role="img" aria-label="') and INK not in svg and "var(--" in svg
    assert "://" not in svg.replace("http://outside", "") and "<metadata" not in svg
    label = re.search('aria-label="([^"]*)"', svg)[1]
    assert ("64.4", "100 at 90", "from 2 to 1")[number] in label
    assert ("no question", "right answers (%)", "step")[number] in svg
    assert set(re.findall('href="#([^"]*)"', svg)) <= set(re.findall('id="([^"]*)"', svg))


def test_drawing_twice_gives_the_same():
    assert drawn() == drawn()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


def text_of(browser, path) -> str:
    """What the page shows, folded parts open."""
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 500, "height": 800}, color_scheme=scheme)
        asked, said = [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 500
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == said == []
        text = page.evaluate("document.body.innerText")
        page.close()
    return text


def test_a_page_fits_every_width_and_asks_for_nothing(tmp_path, browser):
    everything(tmp_path / "page.html")
    for width, media, scheme in ((500, "screen", "dark"), (1200, "screen", "light"), (700, "print", "dark")):
        page = browser.new_page(viewport={"width": width, "height": 800})
        asked, said = [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, said=said: said.append(message.text))
        page.emulate_media(media=media, color_scheme=scheme)
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == said == []
        ink, paper = page.evaluate(
            "[getComputedStyle(document.querySelector('svg text')).fill,"
            " getComputedStyle(document.querySelector('section')).backgroundColor]"
        )
        dark = media == "screen" and scheme == "dark"
        assert (brightness(ink) > 128) == dark and (brightness(paper) < 128) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tmp_path, browser, scheme):
    everything(tmp_path / "page.html")
    for width in (390, 1200):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto((tmp_path / "page.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert findings(page) == []
        page.close()


def test_a_gallery_is_narrowed_to_right_or_wrong_and_to_a_kind(tmp_path, browser):
    kinds = ["size", "place", "size", "place", "size"]
    shown = [Card(None, f"q{n}", "r", "a", right=n < 3, kind=kind) for n, kind in enumerate(kinds)]
    write_page(tmp_path / "page.html", "t", "s", [("one", gallery(shown)), ("two", gallery(shown[:2]))])
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    first = page.locator(".gallery").first

    def visible():
        return [card.locator(".question").inner_text() for card in first.locator(".card:visible").all()]

    assert visible() == ["q0", "q1", "q2", "q3", "q4"]
    first.get_by_label("wrong").check()
    assert visible() == ["q3", "q4"]
    first.get_by_label("size").check()
    assert visible() == ["q4"]
    first.get_by_label("right").check()
    assert visible() == ["q0", "q2"]
    assert page.locator(".gallery").nth(1).locator(".card:visible").count() == 2


def test_a_page_is_printed_by_the_browser_with_what_is_folded(tmp_path, browser):
    pdf = print_page(
        write_page(tmp_path / "page.html", "t", "s", [("one", folded("more", note("x")))]), printing_browser()
    )
    assert pdf == tmp_path / "page.pdf" and pdf.read_bytes()[:5] == b"%PDF-"
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in {".pdf", ".html"}] == []
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert not page.get_by_text("x", exact=True).is_visible()
    page.emulate_media(media="print")
    assert page.get_by_text("x", exact=True).is_visible()


def test_without_a_browser_printing_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LlavaError, match="--pdf needs a browser to print with: none of chromium"):
        printing_browser()


def brightness(color):
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3
