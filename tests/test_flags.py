"""Every flag of every command is used by a test: the parsers are enumerated, the tests' source is searched."""

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from transformers import TrainingArguments

from tests.documented_commands import ROOT

TRAIN = "llava.train.train"
SHARED = {"help", "debug"}
"""Flags of every command, which tests/test_commands.py looks at."""


def command_modules() -> list[str]:
    """Modules that run as `python -m …`."""
    found = []
    for path in sorted((ROOT / "llava").rglob("*.py")):
        if re.search(r'^if __name__ == "__main__":', path.read_text(), re.MULTILINE):
            found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


def flags_of(parser: argparse.ArgumentParser) -> Iterator[set[str]]:
    """The names of each flag of a parser and its sub-parsers, with dashes."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from flags_of(child)
        elif names := {option[2:].replace("_", "-") for option in action.option_strings if option.startswith("--")}:
            yield names


def flags_of_command(module: str) -> list[set[str]]:
    """The flags of a command; of training's those that aren't the library's Trainer's own."""
    if module not in (TRAIN, "llava.train.train_mem"):
        return list(flags_of(importlib.import_module(module).build_parser()))
    from llava.train.arguments import build_parser

    library = {field.name.replace("_", "-") for field in fields(TrainingArguments)}
    return [names for names in flags_of(build_parser()) if not {name.removeprefix("no-") for name in names} & library]


@cache
def used_flags() -> frozenset[str]:
    """Names of the flags that tests use: `--name` in a string, `name=…` in a call."""
    found: set[str] = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path != Path(__file__):
            found |= flags_in(path.read_text())
    return frozenset(found)


def flags_in(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", node.value)}
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg.replace("_", "-"))
    return found


@pytest.mark.parametrize("module", command_modules())
def test_every_flag_is_used_by_a_test(module):
    unused = [min(names) for names in flags_of_command(module) if not names & (used_flags() | SHARED)]
    assert not unused, f"no test uses {', '.join('--' + name for name in unused)} of {module}"


def test_the_search_finds_flags_and_what_lacks_them():
    source = 'run("--some_flag=1 --other-flag", third_flag=2)\nmodel.fourth_flag  # --fifth-flag'
    assert flags_in(source) == {"some-flag", "other-flag", "third-flag"}
    parser = argparse.ArgumentParser()
    parser.add_argument("-x", "--long_name", "--name")
    parser.add_subparsers().add_parser("child").add_argument("--inner")
    assert {"long-name", "name"} in list(flags_of(parser)) and {"inner"} in list(flags_of(parser))
    assert len(command_modules()) > 30 and {"cache-dir"} in flags_of_command(TRAIN)
