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


def test_each_process_is_prepared():
    from llava.processes import process_pool

    with process_pool(1, time.strptime, ("2026", "%Y")) as pool:
        assert pool.submit(abs, -1).result() == 1
