"""What is asked and answered, kept on disk: only with --conversation-log, and said to everyone who asks.

A record has the time, the request's id, the model, the messages (images by the SHA-256 of their content, with how they
were shown), the answer and how it ended. Nothing says who asked.
"""

import asyncio
import contextlib
import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from llava.errors import ImageError
from llava.serve.client import ServingClient, answer_text
from llava.serve.daily_log import DailyLog
from llava.serve.protocol import ErrorType, ServeError

HEADER = "x-conversation-log"
MOST_WAITING = 100
"""Records that a slow disk may keep waiting, in memory."""
CLOSE_SECONDS = 10.0


def add_log_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--conversation-log", metavar="DIR", help="keep what is asked and answered in this folder, and say so"
    )
    parser.add_argument(
        "--conversation-log-days", type=float, default=30.0, help="days after which conversations are deleted"
    )


def log_from_args(args: Namespace) -> DailyLog | None:
    """The log that the flags ask for; a LlavaError where its folder isn't private."""
    return DailyLog(args.conversation_log, args.conversation_log_days) if args.conversation_log else None


def notice(days: float) -> str:
    """What whoever asks is told."""
    return (
        f"What is asked and answered here is kept on this server for {days:g} days; of an image only the checksum "
        "(SHA-256) of its content, of who asked nothing."
    )


class LoggingClient(ServingClient):
    """A ServingClient whose answers are logged.

    Writing has a thread of its own: an answer never waits for the disk.
    """

    log: DailyLog

    def __init__(self, controller: str, secret: str | None, log: DailyLog):
        super().__init__(controller, secret)
        self.log = log
        self._writer = ThreadPoolExecutor(1, "conversation-log")
        self._waiting: list[Future] = []

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(wait, self._waiting, CLOSE_SECONDS)

    async def generate(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        record = await asyncio.to_thread(_asked, body)
        text, end = "", ErrorType.CANCELLED.value  # unless we come to know better: the client may leave
        try:
            async with contextlib.aclosing(super().generate(body)) as chunks:
                async for chunk in chunks:
                    text, end = chunk["text"], chunk.get("finish_reason") or end
                    yield chunk
        except ServeError as error:
            end = error.error_type.value
            raise
        except Exception:
            end = ErrorType.INTERNAL.value
            raise
        finally:
            self._keep({**record, "answer": answer_text(text, body), "end": end})

    def _keep(self, record: dict[str, Any]) -> None:
        self._waiting = [future for future in self._waiting if not future.done()]
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(self._writer.submit(self.log.write, record))
        else:
            self.log.lose(f"{self.log.folder}: the disk is too slow")


def new_client(controller: str, secret: str | None, log: DailyLog | None) -> ServingClient:
    """A client that logs if there is a log."""
    return ServingClient(controller, secret) if log is None else LoggingClient(controller, secret, log)


def _asked(body: dict[str, Any]) -> dict[str, Any]:
    """A worker's request as it is kept."""
    kept = {"request_id": body["request_id"], "model": body["model"]}
    if body.get("messages") is None:
        return kept | {"prompt": body["prompt"], "images": [_hash(image) for image in body["images"]]}
    messages = [
        {"role": message["role"], "content": [_part(part) for part in _parts(message["content"])]}
        for message in body["messages"]
    ]
    return kept | {"messages": messages}


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kept = {name: part[name] for name in part if name in ("type", "text", "image_options")}
    if "image_url" in part:
        kept["image_url"] = {"url": _hash(part["image_url"]["url"])}
    return kept


def _hash(url: str) -> str:
    from llava.images import read_upload

    try:
        return "sha256:" + hashlib.sha256(read_upload(url)).hexdigest()
    except ImageError:
        return "unreadable"
