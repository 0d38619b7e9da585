"""Conversations with the web page as its script holds them: HTTP alone, no browser."""

import asyncio
import html
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import httpx

from llava.serve.protocol import ERRORS
from tests.faults.soak.requests import Again, Client, Lost, image_bytes
from tests.faults.soak.stack import MODEL
from tests.security.page_visitor import Visitor, file_data, question

KINDS = {kind.words: error_type.value for error_type, kind in ERRORS.items()}
FAILED = re.compile(r"\*\*([^*]+)\*\* \(request req-")
MOST_AT_A_TIME = 32
_threads = ThreadPoolExecutor(MOST_AT_A_TIME, "page")


async def conversation(client: Client, dice: random.Random) -> None:
    """A visitor comes, uploads a picture, asks about it, asks once more."""
    await asyncio.get_running_loop().run_in_executor(_threads, _converse, client.stack.page_url, dice)


def _converse(url: str, dice: random.Random) -> None:
    try:
        visitor = Visitor(url)
        try:
            _hold(visitor, dice)
        finally:
            visitor.client.close()
    except (httpx.HTTPError, ValueError, KeyError, AttributeError) as error:
        raise Lost(f"page: {type(error).__name__}: {str(error)[:80]}") from error


def _hold(visitor: Visitor, dice: random.Random) -> None:
    visitor.call(*visitor.timer())
    kind = dice.choice(("PNG", "JPEG", "DICOM"))
    uploaded = visitor.upload(f"scan.{kind.lower()}", image_bytes(kind, dice.randrange(40)))
    if uploaded.status_code in (503, 507):
        raise Again("page: no space", 2.0)
    if uploaded.status_code != 200:
        raise Lost(f"page: upload {uploaded.status_code}")
    for files in ([file_data(uploaded.json()[0])], []):
        words = f"What is in picture {dice.randrange(10**6)}?"
        values = {"box": question(*files, text=words), "model": MODEL, "setting-max_new_tokens": 16}
        events = visitor.call(*visitor.place("box", "submit"), **values)
        _check(events)


def _check(events: list[dict]) -> None:
    """The last event shows a whole answer without an error."""
    last = next((event for event in reversed(events) if event.get("msg") == "process_completed"), None)
    if last is None or not last["success"]:
        raise Lost("page: " + (json.dumps(last["output"])[:200] if last else "no end"))
    if said := FAILED.search(json.dumps(last["output"], ensure_ascii=False)):
        kind = KINDS.get(html.unescape(said[1]), f"page: {said[1]}")
        raise (Again(kind, 1.0) if kind == "queue_full" else Lost(kind))
