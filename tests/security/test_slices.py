"""Slices of a scan are shown to the visitor who has sent it, and to nobody else."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.images.test_medical import dicom
from tests.security.page_visitor import Visitor, assert_refused, file_data, question
from tests.serve.processes import Process

pytest.importorskip("pydicom")
SLICES = re.compile(r"slice/([\w-]{32})\?([^\s\"\\]*?)place=")


@pytest.fixture(scope="module")
def url():
    with Process("llava.serve.gradio_web_server", "--controller", "http://127.0.0.1:1") as process:
        yield process.wait(seconds=500).url


def add_series(visitor: Visitor, grey: int) -> str:
    """Send a series of two slices; the name that the page gives the scan."""
    paths = []
    for place in range(2):
        values = np.full((8, 8), grey + place, np.uint16)
        values[0, :2] = 0, 255
        tags = {"InstanceNumber": str(place), "SeriesInstanceUID": f"1.2.{grey}", "Modality": "CT"}
        content = dicom(values, WindowCenter=127.5, WindowWidth=255, **tags)
        paths += visitor.upload(f"{place}.dcm", content).json()
    events = visitor.call(*visitor.place("take", "click"), box=question(*map(file_data, paths)))
    (name,) = {found[1] for found in SLICES.finditer(str(events))}
    return name


def see(visitor: Visitor, name: str, place: object = 0, **query):
    return visitor.client.get(f"/slice/{name}", params={"place": place, **query})


def test_own_scans_and_only_those(url):
    first, other = Visitor(url), Visitor(url)
    names = {first: add_series(first, 50), other: add_series(other, 90)}
    for visitor, grey in ((first, 50), (other, 90)):
        for place in range(2):
            reply = see(visitor, names[visitor], place, axis="any", window="any")
            assert np.asarray(Image.open(io.BytesIO(reply.content)))[4, 4] == pytest.approx(grey + place, abs=1)
            assert reply.headers["content-type"] == "image/png" and reply.headers["cache-control"] == "no-store"
            assert "sandbox" in reply.headers["content-security-policy"]
    for visitor, name in ((first, names[other]), (other, names[first]), (first, "A" * 32)):
        reply = see(visitor, name)
        assert_refused(reply)
        assert reply.status_code == 403
    first.client.cookies.clear()
    assert see(first, names[first]).status_code == 403


@pytest.mark.parametrize("place", [2, -1, 10**9, "1.5", "one", "", "../0", "0\x00", "١"])
def test_only_slices_that_there_are(url, place):
    visitor = Visitor(url)
    name = add_series(visitor, 70)
    assert see(visitor, name, 1).status_code == 200
    assert_refused(see(visitor, name, place))


@pytest.mark.parametrize("path", ["{}/", "{}/0", "%2e%2e/slice/{}", "{}%00", "{}.png", ""])
def test_a_scan_has_one_address(url, path):
    visitor = Visitor(url)
    assert_refused(see(visitor, path.format(add_series(visitor, 60))))


def test_a_scan_that_was_cleared_is_gone(url):
    visitor = Visitor(url)
    name = add_series(visitor, 40)
    assert see(visitor, name).status_code == 200
    visitor.call(*visitor.place("clear", "click"))
    reply = see(visitor, name)
    assert_refused(reply)
    assert reply.status_code == 403
