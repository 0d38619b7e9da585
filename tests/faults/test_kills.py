"""A handful of kills of what starts quickly; `make kills` does 200 over everything. Each command's own tests kill it at
the moments that matter most to it (test_killed, test_answers, test_apply_delta, test_download_images)."""

import random

import pytest

from tests.faults.commands import COMMANDS
from tests.faults.kills import kill_command
from tests.faults.servers import kill_servers


@pytest.mark.parametrize("name", ["generation", "judging"])
def test_killed_commands_lose_and_double_nothing(name, tmp_path):
    found = kill_command(COMMANDS[name], 2, random.Random(3), tmp_path / "work")
    assert found["kills"] == 2 and found["wrong"] == []


@pytest.mark.parametrize("piece", ["worker-0", "api"])
def test_killed_servers_answer_every_question(piece, tmp_path):
    found = kill_servers(2, random.Random(4), tmp_path, (piece,))
    assert found["wrong"] == [] and found["answered"] >= 4


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_many_kills(name, tmp_path):
    found = kill_command(COMMANDS[name], 12, random.Random(5), tmp_path / "work")
    assert found["kills"] == 12 and found["wrong"] == []


@pytest.mark.long
def test_many_kills_of_servers(tmp_path):
    assert kill_servers(20, random.Random(6), tmp_path)["wrong"] == []
