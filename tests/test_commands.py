"""Every command: it has a parser, says what it does without loading torch, and knows --debug."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llava"
LOADS_TORCH = {"llava.train.train", "llava.train.train_mem"}  # their flags are the Trainer's own dataclass


def command_modules() -> list[str]:
    """Modules that run as a command: those with an `if __name__ == "__main__"`."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            found.append(".".join(part for part in parts if part != "__main__"))
    return found


def test_some_commands_exist():
    assert len(command_modules()) > 5


@pytest.mark.parametrize("module", command_modules())
def test_help_answers_without_torch(module):
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "assert not code, code\n"
        f"assert {module in LOADS_TORCH} or 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--debug" in done.stdout or module in LOADS_TORCH


@pytest.mark.parametrize("module", command_modules())
def test_unknown_flag_exits_with_2(module):
    done = subprocess.run([sys.executable, "-m", module, "--no-such-flag"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_modules_do_not_shadow_the_standard_library():
    """Commands also run as scripts, and then their folder comes first in sys.path."""
    folders = {path.parent for path in PACKAGE.rglob("*.py") if '__name__ == "__main__"' in path.read_text()} - {
        PACKAGE
    }
    assert len(folders) >= 6
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        name = path.stem
        if name.startswith("__"):
            continue
        assert name not in sys.stdlib_module_names, path
        found = importlib.util.find_spec(name)
        # The thin files at the root are the same commands.
        is_ours = found is not None and found.origin is not None and Path(found.origin).parent == PACKAGE.parent
        assert found is None or is_ours, f"{path} would shadow the package {name}"
