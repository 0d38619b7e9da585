"""A disk that is full and a folder that can't be written: one line, exit code 2, nothing half-written, nothing lost."""

import os
import subprocess

import pytest

from tests.faults.commands import COMMANDS, argv
from tests.faults.kills import ENVIRONMENT, ROOT

NAMES = ["download", "generation", "judging"]
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("training", "answering", "delta")]


def run(words) -> subprocess.CompletedProcess:
    return subprocess.run(argv(words), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def assert_one_line(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [*NAMES, *LONG])
def test_a_full_disk(name, disk, tmp_path):
    """Space is given after the failure: the same command goes on, and what it writes is what it would have been."""
    command = COMMANDS[name]
    out = disk("-t", "tmpfs", "-o", "size=64k")
    (filler := out / "filler").write_bytes(bytes(40_000 if name == "download" else 61_000))
    (tmp_path / "inputs").mkdir()
    (tmp_path / "whole").mkdir()
    with command.prepare(tmp_path / "inputs") as words:
        assert_one_line(run(words(out)))
        assert not command.is_whole(out / command.output)
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
        assert run(words(out)).returncode == 0
        assert run(words(tmp_path / "whole")).returncode == 0
        assert command.content(out / command.output) == command.content(tmp_path / "whole" / command.output)


@pytest.mark.parametrize("name", [*NAMES, *LONG])
def test_an_output_that_cannot_be_written(name, disk, tmp_path):
    command = COMMANDS[name]
    out = disk("-t", "tmpfs", "-o", "ro")
    (tmp_path / "inputs").mkdir()
    with command.prepare(tmp_path / "inputs") as words:
        assert_one_line(run(words(out)))
    assert os.listdir(out) == []
