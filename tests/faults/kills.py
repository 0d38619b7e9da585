"""SIGKILL at random moments: what the long-running commands and the servers lose, double or spoil.

    python -m tests.faults.kills --kills 200 [--seed 0] [--command training …]

A command is killed, started again, killed again, and at last left alone: its output has to be that of a run that
nobody disturbed, and has to stand under its name only when it is whole. Prints figures as JSON; exit code 1 if any
output was wrong.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llava.bars import tqdm
from tests.faults.commands import COMMANDS, Command, argv
from tests.faults.servers import kill_servers

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
MOST_IN_A_ROW = 4


def kill_command(command: Command, kills: int, moments: random.Random, folder: Path) -> dict:
    """Kill `command` so often; {"kills", "rounds", "wrong": what was found}."""
    done, rounds, wrong = 0, 0, []
    (folder / "inputs").mkdir(parents=True)
    with command.prepare(folder / "inputs") as words:
        out = _new(folder / "whole")
        began = time.monotonic()
        _finish(words(out))
        lasts = time.monotonic() - began
        expected = command.content(out / command.output)
        bar = tqdm(total=kills, desc=command.name, unit="kill", leave=False)
        while done < kills:
            rounds += 1
            out = _new(folder / "round")
            output = out / command.output
            for _ in range(min(moments.randint(1, MOST_IN_A_ROW), kills - done)):
                was_killed = _kill(words(out), moments.uniform(0.2, 1.0) * lasts)
                done += was_killed
                bar.update(was_killed)
                is_whole = command.is_whole(output)
                if was_killed and is_whole and command.content(output)[:-1] != expected[:-1]:
                    wrong.append(f"round {rounds}: a kill left an unfinished output under its name")
                if command.is_final and is_whole:
                    break
            else:
                _finish(words(out))
            if command.content(output) != expected:
                wrong.append(f"round {rounds}: the output differs")
        bar.close()
    return {"kills": done, "rounds": rounds, "seconds_undisturbed": round(lasts, 1), "wrong": wrong}


def _new(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _kill(words: list[str], seconds: float) -> bool:
    """Whether the command was still running after so many seconds; it isn't any more."""
    process = subprocess.Popen(
        argv(words), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait() == -9
    assert process.returncode == 0, words
    return False


def _finish(words: list[str]) -> None:
    done = subprocess.run(argv(words), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", action="append", choices=[*COMMANDS, "serving"], help="default: all")
    args = parser.parse_args()
    names = args.command or [*COMMANDS, "serving"]
    figures = {}
    for number, name in enumerate(names):
        kills = args.kills // len(names) + (number < args.kills % len(names))
        moments = random.Random(f"{args.seed} {name}")
        with tempfile.TemporaryDirectory() as folder:
            if name == "serving":
                figures[name] = kill_servers(kills, moments, Path(folder))
            else:
                figures[name] = kill_command(COMMANDS[name], kills, moments, Path(folder) / "work")
        print(name, figures[name], file=sys.stderr, flush=True)
    wrong = [found for figure in figures.values() for found in figure["wrong"]]
    total = sum(figure["kills"] for figure in figures.values())
    print(json.dumps({"seed": args.seed, "kills": total, "wrong": len(wrong), "commands": figures}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
