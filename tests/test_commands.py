"""Every command: it has a parser, says what it does without loading torch, and knows --debug."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documented_commands import module_and_flags, unknown_flags

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


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its sub-commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def parser_of(module: str) -> argparse.ArgumentParser:
    if module in LOADS_TORCH:
        module = "llava.train.arguments"
    package = (PACKAGE.parent / module.replace(".", "/")).is_dir()
    return importlib.import_module(f"{module}.__main__" if package else module).build_parser()


@pytest.mark.parametrize("module", sorted({*command_modules()} - {"llava"}))
def test_help_says_what_a_command_is_for_with_an_example_and_a_text_for_every_flag(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help-all"])
    for parser in parsers(parser_of(module)):
        text = parser.format_help()
        assert len([line for line in parser.description.splitlines() if line.strip()]) >= 2, parser.description
        silent = [action.dest for action in parser._actions if not action.help]
        assert not silent, f"no text: {', '.join(silent)}"
        assert "default: None" not in text and "(default: )" not in text
        zeros = [action for action in parser._actions if action.default == 0 and action.default is not False]
        assert " ".join(text.split()).count("(default: 0") >= len(zeros), "a default of 0 isn't named"
        flags = [action for action in parser._actions if action.option_strings]
        if not any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
            assert len([group for group in parser._action_groups if group._group_actions]) >= 2 or len(flags) < 5
        assert "example:" in text


@pytest.mark.parametrize("module", sorted({*command_modules()} - {"llava"}))
def test_the_example_of_the_help_is_a_command_line_of_it(module, monkeypatch):
    parser = parser_of(module)
    for one in parsers(parser):
        example = one.epilog.removeprefix("example:\n").strip()
        words = shlex.split(example.replace("\\\n", " "))
        found, flags = module_and_flags(words)
        assert found == module or module in LOADS_TORCH
        assert not unknown_flags(found, flags)
        if module not in LOADS_TORCH:
            parser.parse_known_args(flags)  # what is required is there, and values are of their kind


def test_training_shows_the_flags_that_people_use_and_all_when_asked(monkeypatch):
    few, many = (
        len(re.findall(r"^  --", help_of(flag, monkeypatch), re.MULTILINE)) for flag in ("--help", "--help-all")
    )
    assert 18 <= few <= 30 and many > 150


def help_of(flag: str, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", ["x", flag])
    return parser_of("llava.train.train").format_help()
