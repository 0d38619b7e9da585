"""Processes of a pool end with the command that started them."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

COMMAND = """
import sys, time
from llava.processes import process_pool

if __name__ == "__main__":
    with process_pool(2, start=sys.argv[1]) as pool:
        list(pool.map(abs, range(8)))
        print("ready", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_none_outlives_a_command_that_is_killed(tmp_path, start, end):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    with subprocess.Popen([sys.executable, script, start], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout.readline() == "ready\n"
        children = psutil.Process(command.pid).children(recursive=True)
        command.send_signal(end)
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=20)
    for process in alive:
        process.kill()
    assert not alive


LOSING = """
import os
from llava.commandline import run
from llava.processes import process_pool

def main():
    with process_pool(2) as pool:
        list(pool.map(abs, range(8)))
        pool.submit(os.abort).result()

run(main)
"""


def test_a_process_that_is_ended_from_outside_is_one_line(tmp_path):
    """As the system does where memory is used up; it was a traceback, and exit code 1: of `validate` that means
    faults."""
    script = tmp_path / "command.py"
    script.write_text(LOSING)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and len(lines) == 1
    assert "memory" in lines[0] and "--workers" in lines[0]


def test_each_process_is_prepared():
    from llava.processes import process_pool

    with process_pool(1, time.strptime, ("2026", "%Y")) as pool:
        assert pool.submit(abs, -1).result() == 1
