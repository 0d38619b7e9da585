"""The package as a whole: it imports lightly, and its public names are all there."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import llava

ROOT = Path(__file__).parents[1]


def test_import_is_lazy():
    script = "import sys, llava; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_resolve():
    for name in llava.__all__:
        assert getattr(llava, name) is not None


def test_unknown_name():
    try:
        llava.nothing  # noqa: B018
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError("llava.nothing exists")


def test_a_wheel_has_all_files_of_the_package(tmp_path):
    """The mark that its types may be used, and the templates: what isn't Python goes in only if pyproject names it."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "llava", source / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "..", "."]
    subprocess.run(command, cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(source)) for path in (source / "llava").rglob("*") if path.is_file()}
    assert {"llava/py.typed", "llava/pages/templates/page.html"} <= files
    assert {name for name in files - packed if not name.startswith("llava/notebook/")} == set()
