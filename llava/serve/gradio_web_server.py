"""The web page: ask about images, with any model that a controller knows. Loads no model.

On this machine alone unless --host says otherwise; --api-key-file then asks visitors for a key.

python -m llava.serve.gradio_web_server --controller http://localhost:21001 --port 7860
"""

import contextlib
import inspect
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

from llava.commandline import ArgumentParser, run
from llava.errors import LlavaError, require
from llava.serve.api.keys import VARIABLE, Keys, read_keys
from llava.serve.conversation_log import add_log_flags, log_from_args, new_client
from llava.serve.daily_log import DailyLog, tidied
from llava.serve.decoding.pool import DecodingPool
from llava.serve.secret import add_secret_flags, secret_from_args
from llava.serve.transport.background import repeating
from llava.serve.transport.hosts import LOOPBACK, Hosts, add_host_flags
from llava.serve.transport.middleware import RequestMiddleware
from llava.serve.transport.server import port_number, require_serving, run_server
from llava.serve.web.browser import BrowserHeaders, visitor_check, visitor_key
from llava.serve.web.uploads import MAX_FILE_BYTES, Uploads, WrittenFiles

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * MAX_FILE_BYTES
SWEEP_SECONDS = 60
MEMORY_FOLDER = Path("/dev/shm")
PREFIX, LOCK = "llava-web-", ".lock"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of this machine's")
    parser.add_argument("--port", type=port_number, default=7860, help="port to listen on")
    parser.add_argument(
        "--controller-url", "--controller", default="http://localhost:21001", help="who knows the models"
    )
    parser.add_argument("--concurrency-count", type=int, default=16, help="questions answered at the same time")
    parser.add_argument(
        "--model-list-mode", choices=("once", "reload"), default="reload", help="look for models once, or all the time"
    )
    parser.add_bool("--share", help="refused: it would lead images through another company's server")
    parser.add_bool("--moderate", help="refused: it would send what is asked to another company")
    parser.add_argument("--first-model", help="the model that is chosen at first (default: the first by name)")
    parser.add_bool("--embed", help="without heading, to stand in another page")
    parser.add_argument("--feedback-dir", help="show vote and flag buttons, and keep what they say in this folder")
    parser.add_argument("--feedback-days", type=float, default=30.0, help="days after which votes are deleted")
    parser.add_argument("--visitor-upload-mb", type=int, default=128, help="MiB of files that one visitor may have")
    parser.add_argument(
        "--upload-mb",
        type=int,
        default=1024,
        help="MiB of files that all visitors may have waiting, and of images in their conversations",
    )
    parser.add_argument(
        "--api-key-file",
        help=f"keys of visitors, one per line: name key (default: ${VARIABLE}, else no key is asked for)",
    )
    add_log_flags(parser)
    add_host_flags(parser)
    add_secret_flags(parser)
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    require_serving("gradio")
    if args.share:
        raise LlavaError("--share leads images through another company's server; use a reverse proxy of your own")
    if args.moderate:
        raise LlavaError("--moderate sends what is asked to another company; there is no such thing here")
    secret = secret_from_args(args)
    keys = read_keys(args.api_key_file, None)
    if not keys.required and args.host not in LOOPBACK:
        logger.warning("no --api-key-file: everybody who reaches port %d may ask", args.port)
    # uvicorn raises the signal anew when it has stopped; without this the folder of uploads would stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with _private_folder() as folder:
        # Both are read when gradio is imported, which `build_app` does.
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        app = build_app(args, secret, folder, keys)
        logger.info("web page at http://%s:%d", args.host, args.port)
        if args.host in LOOPBACK:
            logger.info("from another machine: ssh -L %d:localhost:%d THIS_MACHINE, or --host", args.port, args.port)
        run_server(app, args.host, args.port, timeout_graceful_shutdown=5)


def build_app(args, secret: str | None, folder: Path, keys: Keys) -> BrowserHeaders:
    """The ASGI application of the page; uploads lie in `folder`, which gradio takes for its own."""
    from fastapi import FastAPI

    with _no_stub_files():
        gradio = require("gradio", "serve")
    from llava.serve.web.memory_budget import DrawnViews, MemoryBudget
    from llava.serve.web.middleware import DIRECT, QUEUED, PageMiddleware
    from llava.serve.web.page import MOST_SESSIONS, PageOptions, build_page
    from llava.serve.web.sessions import Sessions
    from llava.serve.web.theme import CSS, HEAD, page_theme

    _steady_sessions()
    client = new_client(args.controller_url, secret, log_from_args(args))
    options = PageOptions(
        reload_models=args.model_list_mode == "reload",
        embed=args.embed,
        first_model=args.first_model,
        concurrency=args.concurrency_count,
        feedback=DailyLog(args.feedback_dir, args.feedback_days) if args.feedback_dir else None,
    )

    # All visitors together leave half of a small file system free.
    in_all = min(args.upload_mb << 20, shutil.disk_usage(folder).free // 2)
    uploads = Uploads(folder, args.visitor_upload_mb << 20, in_all)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        sweeps = uploads.sweep, WrittenFiles(page.temp_file_sets).sweep
        async with tidied(client.log, options.feedback), repeating(SWEEP_SECONDS, *sweeps):
            yield
        await client.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    drawn = DrawnViews(DecodingPool(), MemoryBudget(args.upload_mb << 20))
    page = build_page(client, options, drawn)
    app = gradio.mount_gradio_app(
        app,
        page,
        path="/",
        allowed_paths=[],
        max_file_size=MAX_FILE_BYTES,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        theme=page_theme(),
        css=CSS,
        head=HEAD,
    )
    # `launch` sets these, mounting doesn't; without them gradio checks no path that a request names.
    page.has_launched = page.is_running = True
    handlers: dict[str, dict[int, int]] = {QUEUED: {}, DIRECT: {}}
    for number, handler in page.fns.items():
        handlers[QUEUED if handler.queue else DIRECT][number] = len(handler.inputs)
    sessions = Sessions(page._queue, MOST_SESSIONS, lambda name: name in page.state_holder)
    checked = PageMiddleware(app, handlers, uploads, drawn, sessions, visitor_key(keys), MAX_FILE_BYTES, args.embed)
    known = RequestMiddleware(checked, visitor_check(keys), MAX_BODY_BYTES, Hosts.from_args(args))
    return BrowserHeaders(known, args.embed)


def _steady_sessions() -> None:
    """gradio takes the age of a conversation from the clock of the day: if that were set, the conversations of all who
    are there would go. It only compares, so any clock does."""
    from gradio import state_holder

    steady = SimpleNamespace(now=lambda: datetime.fromtimestamp(time.monotonic(), UTC))
    state_holder.datetime = SimpleNamespace(datetime=steady)  # type: ignore[assignment]


@contextlib.contextmanager
def _no_stub_files():
    """gradio writes .pyi files for editors whenever it is imported, which takes longer than all the rest of it. It
    leaves out classes that are in no file."""
    getfile = inspect.getfile

    def without_components(thing):
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("no stub file for this one")
        return getfile(thing)

    inspect.getfile = without_components
    try:
        yield
    finally:
        inspect.getfile = getfile


@contextlib.contextmanager
def _private_folder():
    """Where uploads pass through: in memory where the system has such a folder, and gone at the end.

    What a server that was killed has left is removed too: nobody holds its lock any more.
    """
    from filelock import FileLock

    in_memory = MEMORY_FOLDER.is_dir() and os.access(MEMORY_FOLDER, os.W_OK)
    base = MEMORY_FOLDER if in_memory else Path(tempfile.gettempdir())
    for left in base.glob(PREFIX + "*"):
        with contextlib.suppress(OSError), FileLock(left / LOCK, timeout=0):
            shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    lock = FileLock(folder / LOCK)
    # Until it is locked, another server that starts takes it for one that was left. filelock makes it anew, for all.
    while not lock.is_locked:
        with contextlib.suppress(FileNotFoundError):
            lock.acquire()
    folder.chmod(0o700)
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run(main)
