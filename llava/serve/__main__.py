"""All of the serving with one command: controller, workers, API and web page; Ctrl-C stops them.

A worker that dies is started again. Each part can also be started by itself, on machines of their own.

python -m llava.serve --model-path CHECKPOINT --model-path ANOTHER
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError
from llava.folders import model_name
from llava.serve.conversation_log import add_log_flags
from llava.serve.secret import VARIABLE, add_secret_flags, secret_from_args
from llava.serve.transport.hosts import add_host_flags
from llava.serve.transport.server import HIGHEST_PORT, port_number, require_serving

logger = logging.getLogger(__name__)

READY_SECONDS = 1800.0  # large checkpoints take their time
STOP_SECONDS = 70.0  # workers drain for 60 by default
LOOK_SECONDS = 0.2
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
SOUND_SECONDS = 300.0  # a server that has lived so long starts anew with the first pause
HEALTH_SECONDS = 5.0


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", action="append", required=True, help="a checkpoint; several times for several")
    parser.add_argument("--model-base", help="for all of them: what a LoRA or projector folder was trained over")
    parser.add_argument("--model-name", action="append", help="names in the order of --model-path")
    parser.add_argument("--device", help="cpu, cuda, …; by default the best there is")
    parser.add_bool("--load-8bit", help="quantize to 8 bits while loading")
    parser.add_bool("--load-4bit", help="quantize to 4 bits while loading")
    parser.add_argument("--host", default="127.0.0.1", help="of API and web page; the rest stays on this machine")
    parser.add_argument("--controller-port", type=port_number, default=21001, help="port of the controller")
    parser.add_argument(
        "--worker-port", type=port_number, default=21002, help="of the first worker; the next ones follow"
    )
    parser.add_argument("--api-port", type=port_number, default=8000, help="port of the API")
    parser.add_argument("--web-port", type=port_number, default=7860, help="port of the web page")
    parser.add_argument("--cache-mb", type=int, help="of each worker, for keys and values: model_worker's --cache-mb")
    parser.add_argument(
        "--api-key-file", help="keys of API and page, one per line: name key [requests per minute, of the API]"
    )
    parser.add_bool("--web", default=True, help="False: no web page")
    parser.add_argument("--feedback-dir", help="show vote and flag buttons on the page, and keep what they say here")
    add_log_flags(parser)
    add_host_flags(parser)
    add_secret_flags(parser)
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    names = args.model_name or []
    if names and len(names) != len(args.model_path):
        raise LlavaError(f"{len(args.model_path)} --model-path but {len(names)} --model-name; give one for each")
    if args.worker_port + len(args.model_path) - 1 > HIGHEST_PORT:
        raise LlavaError(f"--worker-port {args.worker_port}: {len(args.model_path)} workers have no room above it")
    require_serving(*(["gradio"] if args.web else []))
    servers = _servers(args, names)
    _check_ports(servers)
    environment = dict(os.environ)
    if secret := secret_from_args(args):
        environment[VARIABLE] = secret
    # A signal to the group would reach the servers twice; each gets its own from us.
    # SIGINT too: a shell's background job inherits it as ignored, and then Python leaves it so.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    running: list[Running] = []
    try:
        for server in servers:
            running.append(Running(server, environment))
        _wait_until_ready(args, running)
        _watch(running)
    except KeyboardInterrupt:
        write_line("stopping")
    finally:
        _stop(running)
    return 0


@dataclass(frozen=True)
class Server:
    """One of the processes; `url` answers /health once it is up."""

    name: str
    module: str
    url: str
    words: list[str]


@dataclass
class Running:
    """A server's process, and how often it had to be started again of late."""

    server: Server
    environment: dict[str, str]
    process: subprocess.Popen = field(init=False)
    started: float = field(init=False)
    failures: int = 0
    restart_at: float | None = None

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", self.server.module, *self.server.words]
        self.process = subprocess.Popen(command, env=self.environment, start_new_session=True)
        self.started, self.restart_at = time.monotonic(), None

    def revive(self) -> None:
        """Start it again if it has ended, after a pause that doubles while it keeps ending."""
        now = time.monotonic()
        if self.restart_at is not None:
            if now >= self.restart_at:
                self.start()
                logger.warning("%s was started again", self.server.name)
        elif self.process.poll() is not None:
            self.failures = 1 if now - self.started > SOUND_SECONDS else self.failures + 1
            pause = min(FIRST_PAUSE_SECONDS * 2 ** (self.failures - 1), LONGEST_PAUSE_SECONDS)
            logger.error(
                "%s ended with code %s; it is started again in %g s", self.server.name, self.process.returncode, pause
            )
            self.restart_at = now + pause


def _check_ports(servers: list[Server]) -> None:
    """Raises a LlavaError that names a port which another program has: its answers could be taken for ours."""
    for server in servers:
        port = urlsplit(server.url).port
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                free.bind(("127.0.0.1", port))
            except OSError as error:
                flag = {"controller": "controller", "API": "api", "web page": "web"}.get(server.name, "worker")
                raise LlavaError(
                    f"port {port} of the {server.name} is taken ({error.strerror}); stop what listens there, or "
                    f"choose another with --{flag}-port"
                ) from error


def _servers(args, names: list[str]) -> list[Server]:
    controller = f"http://127.0.0.1:{args.controller_port}"
    shared = ["--open-to-everyone"] if args.open_to_everyone else []
    servers = [
        Server("controller", "llava.serve.controller", controller, ["--port", str(args.controller_port), *shared])
    ]
    for number, path in enumerate(args.model_path):
        port = args.worker_port + number
        address = f"http://127.0.0.1:{port}"
        words = ["--model-path", path, "--port", str(port), "--controller", controller, "--worker", address, *shared]
        given = {"--model-base": args.model_base, "--device": args.device, "--cache-mb": args.cache_mb}
        words += [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
        words += ["--model-name", names[number]] if names else []
        words += ["--load-8bit"] * bool(args.load_8bit) + ["--load-4bit"] * bool(args.load_4bit)
        servers.append(Server(f"worker of {path}", "llava.serve.model_worker", address, words))
    front = ["--host", args.host, "--controller", controller, *shared]
    front += [word for name in args.allowed_host for word in ("--allowed-host", name)]
    front += ["--api-key-file", args.api_key_file] if args.api_key_file else []
    if args.conversation_log:
        front += ["--conversation-log", args.conversation_log]
        front += ["--conversation-log-days", str(args.conversation_log_days)]
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
    near = f"[{near}]" if ":" in near else near
    api = Server(
        "API",
        "llava.serve.openai_api_server",
        f"http://{near}:{args.api_port}",
        ["--port", str(args.api_port), *front],
    )
    servers.append(api)
    if args.web:
        words = ["--port", str(args.web_port), *front]
        words += ["--feedback-dir", args.feedback_dir] if args.feedback_dir else []
        words += ["--first-model", names[0] if names else model_name(args.model_path[0])]
        servers.append(Server("web page", "llava.serve.gradio_web_server", f"http://{near}:{args.web_port}", words))
    return servers


def _wait_until_ready(args, running: list[Running]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    missing = list(running)
    while missing:
        _check_alive(running)
        if time.monotonic() > deadline:
            raise LlavaError(f"{missing[0].server.name} didn't come up within {READY_SECONDS:g} s")
        if asyncio.run(_is_healthy(missing[0].server.url)):
            missing.pop(0)
        else:
            time.sleep(LOOK_SECONDS)
    for server in (each.server for each in running):
        if server.name in ("API", "web page"):
            write_line(f"{server.name}: {server.url}{'/v1' if server.name == 'API' else ''}")
    write_line("ready; Ctrl-C stops it")


async def _is_healthy(url: str) -> bool:
    import aiohttp

    from llava.serve.transport.session import open_session

    async with open_session(None, HEALTH_SECONDS) as session:
        try:
            async with session.get(url + "/health", allow_redirects=False) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False


def _watch(running: list[Running]) -> None:
    """One that is lost, as a worker to a model that crashes, comes back; the others go on meanwhile."""
    while True:
        for each in running:
            each.revive()
        time.sleep(LOOK_SECONDS)


def _check_alive(running: list[Running]) -> None:
    for each in running:
        if each.process.poll() is not None:
            raise LlavaError(f"{each.server.name} ended with code {each.process.returncode}; its words are above")


def _stop(running: list[Running]) -> None:
    """Fronts first, so that nothing new comes in while the workers finish."""
    for each in reversed(running):
        if each.process.poll() is None:
            each.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for each in reversed(running):
        try:
            each.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("%s didn't stop in time; killed", each.server.name)
            each.process.kill()
            each.process.wait()


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run(main)
