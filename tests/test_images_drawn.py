"""images/ holds what its script draws, small, and links that lead somewhere."""

import re
import subprocess
import sys

import pytest
from PIL import Image

from tests.documented_commands import ROOT
from tests.serve.browsing import CHROMIUM

IMAGES = ROOT / "images"


@pytest.mark.parametrize("name", ["logo.svg", "pipeline.svg"])
def test_the_drawings_are_the_scripts(name, tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "images.py", tmp_path], check=True, cwd=ROOT,
                   env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})  # fmt: skip
    drawn = (tmp_path / name).read_text()
    assert drawn == (IMAGES / name).read_text(), "run make images"
    assert len(drawn) < 30_000 and "<dc:title>" in drawn


def test_the_list_of_images_names_files_that_are_there():
    for link in re.findall(r"\]\(([^)]+)\)", (IMAGES / "README.md").read_text()):
        assert (IMAGES / link).is_file(), link


def test_the_reports_sections_are_photographed(tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium here; install it or set LLAVA_CHROMIUM")
    pytest.importorskip("playwright", reason="playwright isn't installed")
    script, page = ROOT / "scripts" / "report_images.py", tmp_path / "report.html"
    titles = "Scores", "Loss curves", "Some answers"
    page.write_text("".join(f"<section style='height: 700px'><h2>{title}</h2></section>" for title in titles))
    subprocess.run([sys.executable, script, page, tmp_path], check=True)
    with Image.open(tmp_path / "demo_scores.png") as scores, Image.open(tmp_path / "demo_curves.png") as curves:
        assert (scores.height, curves.height) == (490, 700)
    page.write_text("<section><h2>Others</h2></section>")
    refused = subprocess.run([sys.executable, script, page, tmp_path], capture_output=True, text=True)
    assert refused.returncode and "there is no section 'Scores'" in refused.stderr
