"""The pool of processes that open uploads: what they give back, and what becomes of those that hang, die or lie."""

import base64
import io
import os
import signal
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from llava.images import ImageError, ImageOptions, ImageWithOptions, describe_image, open_image, open_uploaded_image
from llava.serve.decoding.pool import DecodingPool, start_in_thread
from llava.serve.protocol import ErrorType, ServeError
from tests.security.image_bombs import BOMBS
from tests.serve.processes import wait_until

STAND_IN = [sys.executable, "-m", "tests.serve.decoding_stand_in"]


def png(*values: int, size=(30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, values or (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pool():
    pool = DecodingPool()
    yield pool
    pool.close()


@pytest.fixture
def stand_in():
    """A pool whose processes obey the image's first pixel: hang, die, eat memory, lie."""
    pool = DecodingPool(1, seconds=1.0, memory=300 << 20, command=STAND_IN)
    yield pool
    pool.close()


def test_images_are_those_of_open_uploaded_image(pool):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    content = buffer.getvalue()
    url = "data:image/jpeg;base64," + base64.b64encode(content).decode()
    for source in (content, url):
        np.testing.assert_array_equal(np.asarray(pool.open(source)), np.asarray(open_uploaded_image(source)))
    assert pool.open(png(size=(300, 100)), longest=60).size == (60, 20)


@pytest.mark.parametrize("source", [b"", b"no image", "/etc/hostname", "http://127.0.0.1/x.png", png()[:50], 5])
def test_errors_are_those_of_open_uploaded_image(pool, source):
    with pytest.raises(ImageError) as expected:
        open_uploaded_image(source)
    with pytest.raises(ImageError) as found:
        pool.open(source)
    assert str(found.value) == str(expected.value)


def test_warnings_of_readers_come_back(pool, caplog):
    pytest.importorskip("pydicom")
    from tests.images.test_medical import HOUNSFIELD, dicom

    with caplog.at_level("WARNING"):
        scan = dicom(HOUNSFIELD, BurnedInAnnotation="YES")
        assert pool.open(ImageWithOptions(scan, ImageOptions(preset="bone"))).size == (50, 40)
    assert "burnt into its pixels" in caplog.text


def test_options_and_descriptions_are_those_of_the_library(pool):
    pytest.importorskip("pydicom")
    from tests.images.test_medical import HOUNSFIELD, dicom

    scan = ImageWithOptions(dicom(HOUNSFIELD), ImageOptions(window=(0, 500)))
    image, facts = pool.describe(scan)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(open_image(scan)))
    expected = describe_image(scan)
    assert facts["shown"] == expected.shown and tuple(facts["values"]) == expected.values == (-1000, 999)
    with pytest.raises(ImageError, match="slice is given, but the file is a DICOM file"):
        pool.open(ImageWithOptions(scan.source, ImageOptions(slice=1)))


def test_no_process_is_lost_to_what_stands_behind_a_first_look(pool):
    """Pages that are counted, palettes that grow, headers that are sorted."""
    pytest.importorskip("pydicom")
    from tests.security import hidden_bombs

    killed = pool.killed
    for make in (hidden_bombs.tiff_directories, hidden_bombs.tiff_second_image, hidden_bombs.tiff_exif):
        image, facts = pool.describe(make())
        assert image.size == (8, 8) and facts["kind"] == "TIFF"
    for make in (hidden_bombs.palette_lines, hidden_bombs.palette_repeats):
        with pytest.raises(ImageError, match="a palette of more than 256 entries"):
            pool.open(make())
    for make, words in ((hidden_bombs.groups_in_dicom, "elements"), (hidden_bombs.frames_in_dicom, "frames")):
        with pytest.raises(ImageError, match=f"more than .* {words}|4,000,000 {words}"):
            pool.place(make())
    assert pool.killed == killed


def test_processes_are_kept_and_know_no_secret(monkeypatch):
    monkeypatch.setenv("LLAVA_SERVE_SECRET", "s3cret")
    pool = DecodingPool(2)
    try:
        for _ in range(4):
            pool.open(png())
        first = processes(pool)
        assert len(first) == 2
        pool.open(png())
        assert processes(pool) == first
        for pid in first:
            process = psutil.Process(pid)
            assert "LLAVA_SERVE_SECRET" not in process.environ()
            assert process.rlimit(psutil.RLIMIT_AS)[1] < 4 << 30 and process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
            assert not [each for each in process.net_connections() if each.family.name == "AF_INET"]
    finally:
        pool.close()
    wait_until(lambda: not any(map(is_alive, first)), 10)


def processes(pool) -> list[int]:
    return sorted(each.process.pid for each in pool._all if each.process is not None)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("order", "words"), [("hang", "too long"), ("die", "failed"), ("lie", "30000 × 30000")])
def test_a_process_that_fails_costs_one_image_and_is_replaced(stand_in, order, words):
    first = stand_in.open(png(0, 0, 0)).getpixel((0, 0))
    with pytest.raises(ImageError, match=words) as caught:
        stand_in.open(png(*ORDERS[order]))
    assert "\n" not in str(caught.value)
    second = stand_in.open(png(0, 0, 0)).getpixel((0, 0))
    assert first != second, "the stand-in shows its process number"
    assert stand_in.killed == 1


def test_memory_is_limited_and_the_process_lives_on(stand_in):
    first = stand_in.open(png(0, 0, 0)).getpixel((0, 0))
    with pytest.raises(ImageError, match="memory"):
        stand_in.open(png(*ORDERS["eat"]))
    assert stand_in.open(png(0, 0, 0)).getpixel((0, 0)) == first


ORDERS = {"hang": (1, 0, 0), "die": (2, 0, 0), "lie": (3, 0, 0), "eat": (4, 0, 0)}


def test_a_killed_process_is_replaced(pool):
    pool.open(png())
    killed = processes(pool)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, killed)), 10)
    assert pool.open(png()).size == (30, 20)


def test_whoever_leaves_frees_the_process_and_whoever_waits_is_told(stand_in):
    stand_in.seconds = 60.0
    hanging, waiting = start_in_thread(stand_in.open, png(*ORDERS["hang"]), seconds=60, has_images=True)
    queued, _ = start_in_thread(stand_in.open, png(0, 0, 0), seconds=1.0, has_images=True)
    with pytest.raises(ServeError) as caught:
        queued.result(30)
    assert caught.value.error_type is ErrorType.TIMEOUT
    waiting.gone.set()
    with pytest.raises(ServeError) as caught:
        hanging.result(30)
    assert caught.value.error_type is ErrorType.CANCELLED
    assert stand_in.open(png(0, 0, 0)).size == (30, 20)


def test_text_has_threads_of_its_own(stand_in):
    """While a hundred requests wait for images, those without are taken at once."""
    stand_in.seconds = 60.0
    stuck = [start_in_thread(stand_in.open, png(*ORDERS["hang"]), seconds=60, has_images=True) for _ in range(100)]
    done = threading.Event()
    start_in_thread(done.set, seconds=60, has_images=False)
    assert done.wait(30)
    assert not any(work.done() for work, _ in stuck)
    for _, waiting in stuck:
        waiting.gone.set()
    for work, _ in stuck:
        work.cancel() or work.exception(30)


def test_closing_ends_whoever_waits():
    pool = DecodingPool(1, seconds=60.0, command=STAND_IN)
    work, _ = start_in_thread(pool.open, png(*ORDERS["hang"]), seconds=60, has_images=True)
    wait_until(lambda: pool._all[0].process is not None, 30)
    time.sleep(0.2)
    pool.close()
    with pytest.raises(ImageError):
        work.result(30)
    with pytest.raises(ImageError, match="stopping"):
        pool.open(png())


def test_bombs_cost_nothing_here(pool):
    pytest.importorskip("pydicom")
    before, killed = psutil.Process().memory_info().rss, pool.killed
    for name in ("jpeg_in_dicom", "j2k_in_dicom", "tiff_tags", "deflated_dicom"):
        with pytest.raises(ImageError):
            pool.open(BOMBS[name]())
    assert psutil.Process().memory_info().rss - before < 200 << 20
    assert pool.killed == killed
