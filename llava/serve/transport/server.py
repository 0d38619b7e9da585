"""Starting a server: the same settings and limits for controller, workers, API and page."""

import argparse
import contextlib
import sys
from typing import Any

from llava.errors import require
from llava.serve.protocol import KEEP_ALIVE_SECONDS
from llava.serve.transport.memory import return_large_blocks

HIGHEST_PORT = 65_535
MOST_FILES = 65_536
_NOT_STARTED = 3


def require_serving(*more: str) -> None:
    """Raises a LlavaError that names the extra if a package that the servers need (or one of `more`) is missing."""
    for module in ("fastapi", "uvicorn", *more):
        require(module, "serve")


def port_number(text: str) -> int:
    """A port as a flag gives it; 0 is any that is free. Beyond 65535 the system would take the last 16 bits alone."""
    if not text.isdecimal() or int(text) > HIGHEST_PORT:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to {HIGHEST_PORT}, got {text}")
    return int(text)


def run_server(app, host: str, port: int, **more: Any) -> None:
    """Serve an ASGI application until a signal ends it; `more` as for `server_settings`.

    Raises:
        SystemExit: it couldn't be started; the log says why.
    """
    config = require("uvicorn", "serve").Config(app, **server_settings(host, port, **more))
    from llava.serve.transport.connections import FairServer

    server = FairServer(config)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(_NOT_STARTED)


def server_settings(host: str, port: int, limits=None, **more: Any) -> dict[str, Any]:
    """What `uvicorn.run` and `uvicorn.Config` take in addition to the application. Nothing is logged of who asks.

    Args:
        limits: of a connection; by default the usual ones, with no more connections than half of the files that the
            process may open.
        more: other settings of uvicorn.
    """
    require("httptools", "serve")
    return_large_blocks()
    from llava.serve.transport.connections import ConnectionLimits, limited

    if limits is None:
        limits = ConnectionLimits(connections=min(ConnectionLimits.connections, _open_files() // 2))
    return {
        "host": host,
        "port": port,
        "http": limited(limits),
        "ws": "none",
        "log_config": None,  # its lines go the way of all others
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        **more,
    }


def _open_files() -> int:
    """How many files this process may have open, after asking for as many as it is allowed."""
    try:
        import resource
    except ImportError:  # not on this system, which has no such limit either
        return MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft
