"""images/ holds what its script draws, small, and links that lead somewhere."""

import re
import subprocess
import sys

import pytest

from tests.documented_commands import ROOT

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
