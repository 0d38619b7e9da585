"""Views of scans that were drawn: kept within a visitor's and the server's space, and gone with their scan."""

import asyncio
import gc
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from llava.errors import ImageError
from llava.image_options import ImageOptions
from llava.serve.decoding.pool import DecodingPool
from llava.serve.web.chat_state import Chat
from llava.serve.web.memory_budget import MOST_LOOKS, MOST_WAITING, DrawnViews, MemoryBudget
from llava.serve.web.page import Page, PageOptions
from llava.serve.web.parts.incoming import GONE
from llava.serve.web.scans import DrawnView, Scan, read_scans
from tests.serve.test_web_scans import SLICES, series

pytest.importorskip("pydicom")


class Thing:
    """Something else that takes memory."""


@pytest.fixture(scope="module")
def pool():
    pool = DecodingPool(size=1)
    yield pool
    pool.close()


@pytest.fixture
def scan(pool, tmp_path):
    ((scan,), _) = read_scans([(path.name, path.read_bytes()) for path in series(tmp_path, 64)], pool)
    return scan


def draw(scan, pool, views, *places):
    views.add(scan, "visitor")
    for place in places:
        scan.place = place
        view = scan.draw(pool)
        views.keep(view, scan)
    return view


def kept(scan):
    """The numbers of the files of the kept views."""
    return sorted(file for file, _ in scan.drawn)


def test_a_slice_seen_before_is_not_drawn_anew(pool, scan):
    views = DrawnViews(pool, MemoryBudget(1 << 30))
    first = draw(scan, pool, views, *range(SLICES))
    drawn = pool.opened
    assert draw(scan, pool, views, *range(SLICES)) is first
    assert pool.opened == drawn
    scan.window = "lung"
    other = draw(scan, pool, views, SLICES - 1)
    assert pool.opened == drawn + 1 and other.png != first.png
    assert scan.facts["shown"] == other.facts["shown"] != first.facts["shown"]
    scan.window = None
    draw(scan, pool, views, SLICES - 1)
    assert scan.facts["shown"] == first.facts["shown"] and pool.opened == drawn + 1


def test_the_views_of_a_visitor_have_a_space(pool, scan):
    size = max(scan.draw(pool).size for scan.place in range(SLICES))
    budget = MemoryBudget(1 << 30)
    views = DrawnViews(pool, budget, per_visitor=4 * size)
    draw(scan, pool, views, 0, 1, 2, 3, 0, 4)
    assert 0 in kept(scan) and 4 in kept(scan) and 1 not in kept(scan)
    draw(scan, pool, views, *range(SLICES))
    assert budget.taken == sum(view.size for view in scan.drawn.values()) <= 4 * size
    assert kept(scan)[-1] == SLICES - 1


def test_views_make_way_for_images(pool, scan):
    budget = MemoryBudget(1 << 20)
    views = DrawnViews(pool, budget)
    draw(scan, pool, views, 5, 6, 7, 5)
    thing = Thing()
    budget.take(thing, budget.size - scan.drawn[scan.source].size)
    assert kept(scan) == [5]
    del thing
    gc.collect()
    everything = Thing()
    budget.take(everything, budget.size)
    assert kept(scan) == []
    draw(scan, pool, views, 8)
    assert kept(scan) == [] and budget.taken == budget.size
    with pytest.raises(ImageError, match="too many images"):
        budget.take(Thing(), 1)


def test_views_go_with_their_scan(pool, tmp_path):
    ((scan,), _) = read_scans([(path.name, path.read_bytes()) for path in series(tmp_path, 64)], pool)
    budget = MemoryBudget(1 << 30)
    draw(scan, pool, DrawnViews(pool, budget), 1, 2)
    assert budget.taken > 0
    del scan
    gc.collect()
    assert budget.taken == 0


def test_looks_of_a_visitor_leave_room_for_others():
    """Those beyond wait for a turn, as a page that is scrolled through does; a crowd of them is refused."""
    running, most = 0, 0

    class Slow(Scan):
        def draw(self, pool, place=None):
            nonlocal running, most
            running += 1
            most = max(most, running)
            time.sleep(0.05)
            running -= 1
            return DrawnView((0, ImageOptions(slice=place)), b"", {})

    views = DrawnViews(None, MemoryBudget(1 << 30))
    slow = Slow("nifti", [b""], [(0, None)] * 100, 0)
    views.add(slow, "visitor")

    async def draw_all(count):
        nonlocal most
        most = 0
        found = await asyncio.gather(*(views.draw(slow, place) for place in range(count)), return_exceptions=True)
        return [str(each) for each in found if isinstance(each, Exception)]

    assert asyncio.run(draw_all(20)) == [] and most <= MOST_LOOKS
    refused = asyncio.run(draw_all(MOST_LOOKS + MOST_WAITING + 3))
    assert len(refused) == 3 and "queue is full" in refused[0]
    assert asyncio.run(draw_all(1)) == []


@pytest.fixture
def incoming(pool):
    with gr.Blocks():
        page = Page(SimpleNamespace(log=None), PageOptions(), DrawnViews(pool, MemoryBudget(1 << 30)))
    return page.incoming


@pytest.mark.parametrize(
    ("name", "part"), [("IM001", 0.03), ("IM002", 0.5)], ids=["header", "pixels of the middle one"]
)
def test_a_file_of_a_series_that_cannot_be_read_is_named_and_left_out(incoming, tmp_path, name, part):
    paths = [str(path) for path in series(tmp_path, 64)[:3]]
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * part)])
    chat = Chat()
    asyncio.run(incoming.take(chat, paths, SimpleNamespace(request=None)))
    assert len(chat.refused) == 1 and chat.refused[0].startswith(f"{name}: ")
    (scan,) = chat.scans
    assert len(scan.files) == 2 and scan.slices == [(0, None), (1, None)] and scan.icon
    assert content[: int(len(content) * part)] not in scan.files


def test_of_many_that_cannot_be_read_it_is_said_how_many(incoming, tmp_path):
    paths = [str(path) for path in series(tmp_path, 64)[:12]]
    for path in paths[:10]:
        Path(path).write_bytes(Path(path).read_bytes()[:300])
    chat = Chat()
    asyncio.run(incoming.take(chat, paths, SimpleNamespace(request=None)))
    assert len(chat.refused) == 8 and chat.refused[-1] == "and 3 more of 12 files"
    assert [len(scan.files) for scan in chat.scans] == [2]


def test_an_upload_that_is_gone_takes_no_other_along(incoming, tmp_path):
    """As one that is named twice: it is deleted once it is read."""
    first, second, *_ = [str(path) for path in series(tmp_path, 64)]
    chat = Chat()
    asyncio.run(incoming.take(chat, [first, first, second], SimpleNamespace(request=None)))
    assert chat.refused == [GONE] and [len(scan.files) for scan in chat.scans] == [2]
    assert not any((tmp_path / name).exists() for name in (first, second))
