"""data/README.md: its rows are JSON, its records are good, its commands exist with the flags it uses."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from llava.data.convert import main
from llava.data.record_checks import check_form
from llava.image_options import CT_WINDOWS, ImageOptions, ImageWithOptions
from llava.record_content import record_images
from llava.records import read_records

TEXT = (Path(__file__).resolve().parents[2] / "data" / "README.md").read_text(encoding="utf-8")
ROWS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]
COMMANDS = re.findall(r"python -m (llava\.data\.\w+)((?:\\\n|[^\n`])*)", TEXT)


def test_records_are_good():
    records = [row for row in ROWS if "conversations" in row]
    assert len(records) == 2
    for row in records:
        assert check_form(row) == []


def test_every_option_of_an_image_is_shown_and_read():
    (lines,) = re.findall(r"```jsonl\n(.*?)```", TEXT, re.DOTALL)
    images = [image for line in lines.splitlines() for image in record_images(json.loads(line))]
    shown = [set(image.options.as_dict()) for image in images if isinstance(image, ImageWithOptions)]
    names = {field.name for field in dataclasses.fields(ImageOptions)}
    assert len(images) == 4 and set().union(*shown) == names
    assert all(f"`{name}`" in TEXT for name in {*names, *CT_WINDOWS})


def test_the_csv_example_converts(tmp_path):
    (table,) = re.findall(r"```csv\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my.csv").write_text("\n".join(line.strip() for line in table.splitlines()))
    (tmp_path / "images").mkdir()
    for name in ("chest_01.jpg", "head_07.png"):
        (tmp_path / "images" / name).write_bytes(b"x")
    main(["csv", "--input", str(tmp_path / "my.csv"), "--image-folder", str(tmp_path / "images"),
          "--output-dir", str(tmp_path)])  # fmt: skip
    assert len(read_records(tmp_path / "train.json")) == 3


@pytest.mark.parametrize(("module", "rest"), COMMANDS)
def test_commands_take_the_flags_shown(module, rest):
    parser = importlib.import_module(module).build_parser()
    known = {flag.replace("_", "-") for flag in _flags(parser)}
    used = {flag.replace("_", "-") for flag in re.findall(r"(--[\w-]+)", rest)}
    assert used <= known


def _flags(parser):
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from _flags(command)
