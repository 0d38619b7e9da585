"""Untrusted images are opened in processes of their own, with limits on memory and time.

A decoder that nobody audited can so stop, hang or take over nothing but such a process, which has no secret, no
network of ours and no file open for writing; it is killed and replaced. Needs no torch.

Opening blocks, so it is done in threads (`in_thread`) which know until when their request waits for them.
"""

import asyncio
import contextlib
import contextvars
import json
import logging
import os
import queue
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

from PIL import Image

from llava.errors import ImageError
from llava.image_options import ImageWithOptions, options_of
from llava.images import UPLOAD_LIMITS, read_upload
from llava.images.series import SeriesPlace
from llava.record_content import image_file
from llava.serve.decoding.process import HEAD, READY
from llava.serve.protocol import ErrorType, ServeError

logger = logging.getLogger(__name__)

_PROGRAM = "from llava.serve.decoding.process import main; main()"

SECONDS = 10.0
"""For one image. Header caps keep any image under 5 of one core (`llava.images.limits`)."""
MEMORY = 1536 << 20
"""Bytes that a process may take for an image."""
_START_SECONDS = 60.0
_STOP_SECONDS = 5.0
_LOOK_SECONDS = 0.05
_PIECE = 1 << 20
_MAX_WORDS = 64 << 10
_KEPT_VARIABLES = (
    "PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV",
)  # fmt: skip
"""Of the environment: keys and secrets stay out of the processes."""

_text_threads = ThreadPoolExecutor(8, "llava-text")
_image_threads = ThreadPoolExecutor(64, "llava-images")
_schema_threads = ThreadPoolExecutor(16, "llava-schemas")


@dataclass
class Waiting:
    """Until when (of `time.monotonic`) a request waits; `gone` once nobody does any more."""

    deadline: float
    gone: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises ServeError CANCELLED or TIMEOUT."""
        if self.gone.is_set():
            raise ServeError(ErrorType.CANCELLED)
        if time.monotonic() > self.deadline:
            raise ServeError(ErrorType.TIMEOUT)


_waiting: contextvars.ContextVar[Waiting | None] = contextvars.ContextVar("waiting", default=None)


def start_in_thread(
    function: Callable[..., Any], *arguments: Any, seconds: float, has_images: bool, has_schema: bool = False
) -> tuple[Future, Waiting]:
    """Run `function` in a thread; what it opens with a pool is given up after `seconds`, or once `gone` is set.

    Text never waits for images, nor either of them for schemas: each has threads of its own.
    """
    waiting = Waiting(time.monotonic() + seconds)
    context = contextvars.copy_context()
    context.run(_waiting.set, waiting)
    threads = _schema_threads if has_schema else _image_threads if has_images else _text_threads
    return threads.submit(context.run, function, *arguments), waiting


async def in_thread(function: Callable[..., Any], *arguments: Any, seconds: float, has_images: bool = True) -> Any:
    """The same to be awaited; cancelling it gives the images up.

    Raises:
        ServeError: TIMEOUT; and what `function` raises.
    """
    work, waiting = start_in_thread(function, *arguments, seconds=seconds, has_images=has_images)
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.wrap_future(work)
    except TimeoutError:
        raise ServeError(ErrorType.TIMEOUT) from None
    finally:
        waiting.gone.set()


class DecodingPool:
    """`size` processes, started when they are first needed and kept.

    Args:
        seconds: for one image, once its turn has come.
        memory: bytes for one image.
        command: of a process, for tests; it is given a socket's number and `memory`.
    """

    def __init__(self, size: int = 2, seconds: float = SECONDS, memory: int = MEMORY, command: list[str] | None = None):
        self.seconds = seconds
        command = command or [sys.executable, "-c", _PROGRAM]
        self._all = [_Process(command, memory) for _ in range(size)]
        self._free: queue.Queue[_Process] = queue.Queue()
        for process in self._all:
            self._free.put(process)
        self.opened = self.killed = 0
        """How many images were opened, and how many processes had to be replaced."""

    def open(self, source: bytes | str | ImageWithOptions, longest: int | None = None) -> Image.Image:
        """As `llava.images.open_uploaded_image`, in one of the processes; blocks.

        Args:
            longest: make it smaller, to so many pixels of the longer side.

        Raises:
            ImageError: no image, or it took too long or too much memory.
            ServeError: CANCELLED or TIMEOUT of the request that this thread works for.
        """
        return _image(*self._ask(source, {"longest": longest}))

    def describe(self, source: bytes | str | ImageWithOptions) -> tuple[Image.Image, dict[str, Any]]:
        """The image, and what `llava.images.describe_image` says of it, as JSON; else as `open`."""
        reply, pixels = self._ask(source, {"describe": True})
        return _image(reply, pixels), reply.get("facts") or {}

    def place(self, content: bytes) -> SeriesPlace:
        """Where a DICOM file stands in its series (`llava.images.series`); else as `open`."""
        reply, _ = self._ask(content, {"place": True})
        if "place" not in reply:
            raise _refused(reply)
        return SeriesPlace(**reply["place"])

    def ask(self, content: bytes) -> dict[str, Any]:
        """What a process of another program (`command`) replies to `content`; else as `open`."""
        return self._reply(content, {})[0]

    def _ask(
        self, source: bytes | str | ImageWithOptions, wanted: dict[str, Any]
    ) -> tuple[dict[str, Any], Image.Image | None]:
        content = read_upload(image_file(source), UPLOAD_LIMITS)
        return self._reply(content, (options_of(source) or {}) | wanted)

    def _reply(self, content: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], Image.Image | None]:
        waiting = _waiting.get() or Waiting(time.monotonic() + 6 * self.seconds)
        process = self._take(waiting)
        try:
            reply, pixels = process.ask(content, options, waiting, self.seconds)
        except BaseException as error:
            # Whatever it still does, nobody waits for it, and its next reply would be this one's.
            process.kill()
            self.killed += 1
            if isinstance(error, (OSError, ValueError)):
                logger.warning("a process that opened what was sent was lost (%s); a new one takes its place", error)
                raise ImageError("image: it can't be read: the process that opened it failed") from None
            raise
        finally:
            self._free.put(process)
        self.opened += 1
        return reply, pixels

    def close(self) -> None:
        """End the processes; whoever still waits for one gets an ImageError."""
        for process in self._all:
            process.close()

    def _take(self, waiting: Waiting) -> "_Process":
        while True:
            waiting.check()
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=_LOOK_SECONDS)


def _image(reply: dict[str, Any], pixels: Image.Image | None) -> Image.Image:
    if pixels is None:
        raise _refused(reply)
    return pixels


def _refused(reply: dict[str, Any]) -> ImageError:
    return ImageError(str(reply.get("error"))[:500])


class _Process:
    """One of the processes; used by one thread at a time."""

    def __init__(self, command: list[str], memory: int):
        self.command, self.memory = command, memory
        self.process: subprocess.Popen | None = None
        self.connection: socket.socket
        """There while `process` is."""
        self.is_closed = False

    def ask(
        self, content: bytes, options: dict[str, Any], waiting: Waiting, seconds: float
    ) -> tuple[dict[str, Any], Image.Image | None]:
        """Raises OSError or ValueError where the process fails, ImageError where it takes too long."""
        if self.is_closed:
            raise ImageError("image: the server is stopping")
        self._start(waiting)
        until = time.monotonic() + seconds
        words = json.dumps(options).encode()
        self._send(HEAD.pack(len(words), len(content)) + words, waiting, until)
        self._send(content, waiting, until)
        num_words, num_pixels = HEAD.unpack(self._receive(HEAD.size, waiting, until))
        if num_words > _MAX_WORDS:
            raise ValueError("a reply of another form")
        reply = json.loads(self._receive(num_words, waiting, until))
        for warning in reply.get("warnings", []):
            logger.warning("%s", str(warning)[:200])
        if "size" not in reply:
            return reply, None
        width, height = (int(side) for side in reply["size"])
        UPLOAD_LIMITS.check_size(width, height, "image")
        if num_pixels != 3 * width * height:
            raise ValueError("a reply of another size")
        pixels = self._receive(num_pixels, waiting, until)
        # Pillow's annotation leaves out that it takes any buffer.
        return reply, Image.frombuffer("RGB", (width, height), cast(bytes, pixels), "raw", "RGB", 0, 1).copy()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.connection.close()
            self.process = None

    def close(self) -> None:
        """For good. The process ends by itself where its socket closes; one that is busy is killed."""
        self.is_closed = True
        process = self.process
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)

    def _start(self, waiting: Waiting) -> None:
        # Between two requests it has nothing to say: what can be read then is its end.
        if self.process is not None and self.process.poll() is None and not self._is_ready(select.POLLIN, 0):
            return
        self.kill()
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [*self.command, str(theirs.fileno()), str(self.memory)],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A signal to the terminal's group is the server's matter.
                start_new_session=True,
            )
        ours.setblocking(False)
        self.connection = ours
        if self._receive(len(READY), waiting, time.monotonic() + _START_SECONDS) != READY:
            raise ValueError("a process that doesn't start")

    def _send(self, content: bytes, waiting: Waiting, until: float) -> None:
        view = memoryview(content)
        while view:
            self._wait(select.POLLOUT, waiting, until)
            with contextlib.suppress(BlockingIOError):
                view = view[self.connection.send(view[:_PIECE]) :]

    def _receive(self, size: int, waiting: Waiting, until: float) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            self._wait(select.POLLIN, waiting, until)
            with contextlib.suppress(BlockingIOError):
                received = self.connection.recv_into(view[done:])
                if not received:
                    raise ConnectionError("it ended")
                done += received
        return content

    def _wait(self, event: int, waiting: Waiting, until: float) -> None:
        """Until the socket is ready; in short turns, so that a request that is given up frees the process."""
        while True:
            waiting.check()
            if time.monotonic() > until:
                raise ImageError("image: it takes too long to be read; send a smaller or a plainer one")
            if self._is_ready(event, _LOOK_SECONDS):
                return

    def _is_ready(self, event: int, seconds: float) -> bool:
        # Not select.select, which takes no socket beyond the thousandth of a process.
        poller = select.poll()
        poller.register(self.connection, event)
        return bool(poller.poll(seconds * 1000))
