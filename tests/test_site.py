"""The documentation is built without a warning: links, anchors and names of the interface are there."""

import os
import re
import subprocess
import sys

import pytest

from llava.__main__ import VERBS
from tests.documented_commands import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_command_has_its_help_there(site):
    page = (site / "reference" / "commands.html").read_text()
    for verbs in VERBS.values():
        for verb in verbs:
            assert f"<code>llava-med {verb}</code>" in page, verb
            assert re.search(rf"usage: (?:python -m )?[\w. -]*{verb}", page), verb


def test_files_outside_of_docs_are_pages_and_links_lead_to_them(site):
    assert "Your own images in five minutes" in (site / "project" / "data.html").read_text()
    assert 'href="project/data.html"' in (site / "faq.html").read_text()


def test_names_of_the_interface_are_described(site):
    page = (site / "reference" / "api.html").read_text()
    for name in ("llava.assistant.load", "llava.images.open_image", "llava.generation.engine.Engine"):
        assert f'id="{name}"' in page


def test_no_page_asks_for_anything_from_elsewhere(site):
    for path in site.rglob("*.html"):
        found = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?://[^"]+)"', path.read_text())
        assert [url for url in found if "canonical" not in url] == [], path.name
