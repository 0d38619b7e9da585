"""Uploads to a worker over real sockets: bombs, images that hang, clients that leave; and to a vulnerable stand-in."""

import base64
import contextlib
import io
import threading

import httpx
import psutil
import pytest
from PIL import Image

from llava.serve.protocol import split_chunks
from llava.serve.secret import HEADER
from tests.security.image_bombs import BOMBS
from tests.serve.processes import Process, wait_until

ENV = {"LLAVA_SERVE_SECRET": "s3cret"}
SECRET = {HEADER: "s3cret"}
MODULE = "tests.security.opening_worker"
SENT = ("jpeg_in_dicom", "j2k_in_dicom", "deflated_dicom", "tables_in_dicom", "tiff_tags", "tiff_tile", "nifti_zeros")
MEMORY = 400 << 20


def hang() -> bytes:
    """What the stand-in for a decoder takes for ever with."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(worker, *images: bytes, seconds: float = 120) -> dict:
    """The last chunk."""
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:;base64,{base64.b64encode(image).decode()}"}}
        for image in images
    ]
    body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]}
    reply = httpx.post(worker.url + "/worker_generate_stream", json=body, headers=SECRET, timeout=seconds)
    assert reply.status_code == 200
    return split_chunks(reply.content)[0][-1]


def opening(worker) -> int:
    return httpx.post(worker.url + "/worker_get_status", headers=SECRET, timeout=30).json()["stats"]["opening"]


def peak(worker) -> int:
    """Bytes of the worker's own process."""
    return psutil.Process(worker.process.pid).memory_info().rss


def test_bombs_are_bad_images_and_the_worker_stays_as_it_is():
    pytest.importorskip("pydicom")
    with Process(MODULE, env=ENV) as worker:
        worker.wait()
        assert ask(worker, hang())["text"] == "seen", "a harmless image"
        before = peak(worker)
        for name in SENT:
            last = ask(worker, BOMBS[name]())
            sound = name == "nifti_zeros"
            assert last.get("error_type", "none") == ("none" if sound else "bad_image"), (name, last)
            assert "\n" not in last["text"]
        assert peak(worker) - before < MEMORY
        assert ask(worker)["text"] == "seen"


def test_a_worker_that_opens_plainly_is_hurt():
    """The same against the stand-in: one of them takes a gigabyte of the worker itself."""
    with Process(MODULE, "--pooled", "False", env=ENV) as worker:
        worker.wait()
        before, highest, done = peak(worker), 0, threading.Event()

        def watch():
            nonlocal highest
            while not done.wait(0.02):
                with contextlib.suppress(psutil.Error):
                    highest = max(highest, peak(worker))

        watcher = threading.Thread(target=watch)
        watcher.start()
        ask(worker, BOMBS["tiff_tile"]())
        done.set()
        watcher.join()
        assert highest - before > MEMORY


@pytest.fixture(params=[True, False], ids=["pooled", "vulnerable"])
def stuck(request):
    """(worker with twelve requests whose images take for ever, is it the real thing, their clients)"""
    with Process(MODULE, "--hanging", "True", "--pooled", str(request.param), env=ENV) as worker:
        worker.wait()
        body = base64.b64encode(hang()).decode()
        content = [{"type": "image_url", "image_url": {"url": f"data:;base64,{body}"}}]
        json = {"messages": [{"role": "user", "content": content}]}
        clients = [httpx.Client(headers=SECRET, timeout=60) for _ in range(12)]
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(client.stream("POST", worker.url + "/worker_generate_stream", json=json))
                for client in clients
            ]
            wait_until(lambda: opening(worker) == 12 or not request.param, 30)
            yield worker, request.param, streams


def test_text_is_answered_while_images_hang(stuck):
    worker, is_real, _ = stuck
    if is_real:
        assert ask(worker)["text"] == "seen"
    else:
        with pytest.raises(httpx.TimeoutException):
            ask(worker, seconds=3)


def test_clients_that_leave_free_their_places(stuck):
    worker, is_real, streams = stuck
    for stream in streams:
        stream.close()
    if is_real:
        wait_until(lambda: opening(worker) == 0, 30)
        # And the processes that were busy with them: the next image that can be read is.
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        assert ask(worker, buffer.getvalue())["text"] == "seen"
    else:
        with pytest.raises(AssertionError):
            wait_until(lambda: opening(worker) == 0, 2)


def test_an_image_that_takes_too_long_is_a_bad_image():
    with Process(MODULE, "--hanging", "True", "--seconds", "1", env=ENV) as worker:
        worker.wait()
        last = ask(worker, hang())
        assert last["error_type"] == "bad_image" and "too long" in last["text"]
