"""A process that opens images for others, one after the other, and may be killed for one: see `decoding.pool`.

It is started with a socket and its memory's limit. A request is a length, JSON of options and the file's content; the
reply is JSON with an error or a size, and the pixels. Nothing is unpickled on either side.
"""

import json
import logging
import resource
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.errors import LlavaError
from llava.image_options import ImageOptions, ImageWithOptions
from llava.images import UPLOAD_LIMITS
from llava.images.opening import open_and_describe, open_image
from llava.images.series import series_place

HEAD = struct.Struct("<LL")
"""Bytes of the JSON and of what follows it."""
READY = b"ready\n"
_MAX_WARNINGS = 5


def main() -> None:
    run(_import_readers, _open)


def run(prepare: Callable[[], None], answer: Callable[[bytes, dict], tuple[dict, bytes]]) -> None:
    """Serve until the other side closes.

    Args:
        prepare: what takes time or memory that no request is to pay for.
        answer: from a content and its options to the reply's JSON and what follows it.
    """
    connection = socket.socket(fileno=int(sys.argv[1]))
    warnings: list[str] = []
    logger = logging.getLogger("llava")
    logger.propagate = False
    logger.addHandler(_Collector(warnings))
    prepare()
    _limit(int(sys.argv[2]))
    connection.sendall(READY)
    while head := _receive(connection, HEAD.size):
        num_options, num_content = HEAD.unpack(head)
        options = json.loads(_receive(connection, num_options))
        content = _receive(connection, num_content)
        warnings.clear()
        reply, pixels = answer(content, options)
        reply["warnings"] = warnings[:_MAX_WARNINGS]
        words = json.dumps(reply).encode()
        connection.sendall(HEAD.pack(len(words), len(pixels)) + words)
        connection.sendall(pixels)


def _open(content: bytes, options: dict) -> tuple[dict, bytes]:
    longest, is_described = options.pop("longest", None), options.pop("describe", False)
    reply: dict[str, Any] = {}
    try:
        if options.pop("place", False):
            return {"place": asdict(series_place(content))}, b""
        source = ImageWithOptions(content, ImageOptions.parse(options))
        if is_described:
            image, facts = open_and_describe(source, limits=UPLOAD_LIMITS)
            reply["facts"] = facts.as_dict()
        else:
            image = open_image(source, limits=UPLOAD_LIMITS)
        if longest is not None:
            image.thumbnail((longest, longest))
        return reply | {"size": image.size}, image.tobytes()
    except LlavaError as error:
        return {"error": str(error)}, b""
    except MemoryError:
        return {"error": "image: the image needs more memory than there is"}, b""


def _receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes; none once the other side has closed."""
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        received = connection.recv_into(view[done:])
        if not received:
            return b""
        done += received
    return bytes(content)


def _import_readers() -> None:
    """Before the limits, and not in the time of a request."""
    import importlib
    import importlib.util

    for module in ("llava.images.dicom", "llava.images.nifti"):
        importlib.import_module(module)
    for module in ("pydicom.pixels", "nibabel"):
        if importlib.util.find_spec(module.partition(".")[0]):
            importlib.import_module(module)


def _limit(memory: int) -> None:
    """No more than `memory` bytes beyond what is there, no file written, no image of the process on disk."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    space = pages * resource.getpagesize() + memory
    for what, most in ((resource.RLIMIT_AS, space), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))


class _Collector(logging.Handler):
    """What the readers warn of goes back with the reply."""

    def __init__(self, warnings: list[str]):
        super().__init__(logging.WARNING)
        self.warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())
