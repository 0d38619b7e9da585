"""`python -m llava.serve`: everything up with one command, everything gone with Ctrl-C."""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys

import httpx
import psutil
import pytest

from llava.errors import LlavaError
from llava.serve.conversation_log import HEADER
from tests.serve.processes import free_port, wait_until
from tests.tiny import make_llava


def answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def start(path, ports, *words):
    flags = ["--controller-port", "--worker-port", "--api-port", "--web-port"]
    pairs = [word for flag, port in zip(flags, ports, strict=True) for word in (flag, str(port))]
    command = [sys.executable, "-m", "llava.serve", "--model-path", str(path), "--device", "cpu", *pairs, *words]
    environment = {**os.environ, "LLAVA_SERVE_SECRET": "s3cret", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_one_command_starts_all_what_was_killed_comes_back_and_a_signal_stops_all(tmp_path, number):
    ports = [free_port() for _ in range(4)]
    kept, has_page = tmp_path / "kept", number == signal.SIGINT
    words = ["--model-name", "tiny", "--cache-mb", "64", "--web", str(has_page)]
    words += ["--conversation-log", str(kept), "--conversation-log-days", "4"]
    process = start(make_llava(tmp_path), ports, *words)
    try:
        for line in process.stdout:
            if line.startswith("ready"):
                break
        else:
            raise AssertionError(process.stderr.read()[-2000:])
        wait_until(lambda: httpx.get(f"http://127.0.0.1:{ports[2]}/ready").status_code == 200, 30)
        assert ask(ports[2]).headers[HEADER] == "kept for 4 days"
        wait_until(lambda: list(kept.glob("*.jsonl")), 30)
        assert not has_page or "kept on this server for 4 days" in httpx.get(f"http://127.0.0.1:{ports[3]}").text
        for port, module in ((ports[1], "llava.serve.model_worker"), (ports[0], "llava.serve.controller")):
            first, words = child_of(process.pid, module)
            assert ("64" in words) == (module == "llava.serve.model_worker")
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: child_of(process.pid, module)[0] not in (None, first) and answers(port), 240)  # noqa: B023
            wait_until(lambda: ask(ports[2]).status_code == 200, 60)
        process.send_signal(number)
        assert process.wait(60) == 0
        assert not any(answers(port) for port in ports)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    assert "worker of" in (said := process.stderr.read()) and "was started again" in said


def ask(port):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)


def child_of(parent, module):
    """(id, command line) of the child of a process that runs a module."""
    for child in psutil.Process(parent).children():
        with contextlib.suppress(psutil.Error):
            if module in (words := child.cmdline()):
                return child.pid, words
    return None, []


def test_a_server_that_cannot_start_stops_the_rest(tmp_path):
    ports = [free_port() for _ in range(4)]
    process = start(tmp_path / "nothing", ports, "--web", "False")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "worker of" in errors.splitlines()[-1] and "ended with code 2" in errors.splitlines()[-1]
    assert not any(answers(port) for port in ports)


@pytest.mark.parametrize("module", ["__main__", "controller", "model_worker", "openai_api_server", "gradio_web_server"])
@pytest.mark.parametrize("given", ["70000", "-1", "web"])
def test_a_port_that_cannot_be_is_named(module, given, capsys):
    main = importlib.import_module(f"llava.serve.{module}").main
    flag = "--api-port" if module == "__main__" else "--port"
    with pytest.raises(SystemExit, match="2"):
        main(["--model-path", "x", f"{flag}={given}"] if module == "__main__" else [f"{flag}={given}"])
    assert f"{flag}: expected a port from 0 to 65535, got {given}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "near"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.0.0.7", "10.0.0.7")]
)
def test_servers_are_asked_where_they_listen(host, near):
    module = importlib.import_module("llava.serve.__main__")
    servers = module._servers(module.build_parser().parse_args(["--model-path", "x", "--host", host]), [])
    assert [server.url for server in servers[-2:]] == [f"http://{near}:8000", f"http://{near}:7860"]


def test_workers_need_ports_above_the_first():
    with pytest.raises(LlavaError, match="--worker-port 65535: 2 workers"):
        importlib.import_module("llava.serve.__main__").main(
            ["--model-path", "x", "--model-path", "y", "--worker-port", "65535"]
        )


def test_a_port_that_another_program_has_is_named(tmp_path):
    ports = [free_port() for _ in range(4)]
    with socket.create_server(("127.0.0.1", ports[2])):
        process = start(tmp_path / "nothing", ports)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"port {ports[2]} of the API is taken" in errors and "--api-port" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("module", "missing"),
    [("__main__", "fastapi"), ("controller", "fastapi"), ("model_worker", "uvicorn"), ("openai_api_server", "uvicorn"),
     ("gradio_web_server", "gradio")],
)  # fmt: skip
def test_a_missing_extra_is_named(module, missing):
    words = ["--model-path", "x"] if module in ("__main__", "model_worker") else []
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {words}\n"
    code += f"runpy.run_module('llava.serve.{module}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "llava-med[serve]"' in done.stderr and "Traceback" not in done.stderr
