"""A training process that is killed at any moment and started again continues the same loss curve, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny import make_llava
from tests.train.helpers import flags, losses, make_records

ROOT = Path(__file__).resolve().parents[2]


def start(argv, said=subprocess.DEVNULL):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "llava.train.train", *argv], cwd=ROOT, env=environment, stderr=said)


def test_sigkill_at_three_moments(tmp_path):
    base = make_llava(tmp_path / "base")
    data = make_records(tmp_path / "data", 24)
    more = ("--num_train_epochs", "6", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2")
    assert start(flags(tmp_path / "whole", data, base, *more)).wait(timeout=300) == 0
    killed = tmp_path / "killed"
    kills = 0
    # Killed when the first checkpoint begins to appear, in the middle, and near the end; then left alone.
    for step in (3, 30, 63):
        process = start(flags(killed, data, base, *more))
        while process.poll() is None:
            names = [path.name for path in killed.glob("*checkpoint-*")] if killed.is_dir() else []
            if any(int(name.removesuffix(".part").rpartition("-")[2]) >= step for name in names):
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
                break
            time.sleep(0.01)
        assert not (killed / "config.json").is_file(), "the final model appeared although the run was killed"
    assert kills == 3
    assert start(flags(killed, data, base, *more)).wait(timeout=300) == 0
    assert losses(killed) == losses(tmp_path / "whole")
    whole, found = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert not [path.name for path in killed.iterdir() if "part" in path.name]


def test_what_is_said_by_a_run_that_goes_on_is_ours(tmp_path):
    data, base, said = make_records(tmp_path / "data"), make_llava(tmp_path / "base"), tmp_path / "said"
    argv = flags(tmp_path / "run", data, base, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "0.5")
    argv[argv.index("--logging_steps") : argv.index("--logging_steps") + 2] = []
    with said.open("w") as file:
        process = start(argv, file)
        while not (tmp_path / "run" / "checkpoint-2").is_dir() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
    for last in ("finished at step 4", "finished before"):
        with said.open("w") as file:
            assert start(argv, file).wait(timeout=300) == 0
        lines = said.read_text().splitlines()
        assert not [line for line in lines if not line.startswith(("INFO llava.", "WARNING llava."))]
        assert "resuming from" in lines[-2] and last in lines[-1]
