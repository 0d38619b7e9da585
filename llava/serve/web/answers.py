"""What the web page does when a question is asked: one or two models answer at the same time, in pieces."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from llava.errors import LlavaError
from llava.sampling_params import SamplingParams
from llava.serve.client import ServingClient
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.web.chat_state import MOST_TEXT, TOO_LONG, Chat, Reply, text_length
from llava.serve.web.memory_budget import MemoryBudget

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 0.08  # between two states of the page


async def answer(
    client: ServingClient, chat: Chat, models: list[str | None], sampling: SamplingParams, budget: MemoryBudget
) -> AsyncIterator[None]:
    """Fill the replies to the chat's last question; yields whenever there is more to show.

    An answer ends where the conversation has MOST_TEXT, and goes if `budget` has no space for it.

    `chat.stopping` ends it; so does closing the iterator. Errors become words in the reply.
    """
    exchange = chat.exchanges[-1]
    exchange.asked = datetime.now(UTC).isoformat(timespec="seconds")
    exchange.sampling = {**sampling.common(), "max_new_tokens": sampling.max_new_tokens}
    chat.stopping = False
    changed = asyncio.Event()
    tasks = []
    for side, model in enumerate(models):
        exchange.replies[side] = None
        if model:
            exchange.replies[side] = reply = Reply(model, request_id="req-" + secrets.token_hex(8))
            tasks.append(
                asyncio.create_task(_fill(client, chat, reply, chat.messages(side), sampling, budget, changed))
            )
    try:
        while not all(task.done() for task in tasks) and not chat.stopping:
            changed.clear()
            yield
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await changed.wait()
            await asyncio.sleep(REFRESH_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    yield


async def _fill(
    client: ServingClient,
    chat: Chat,
    reply: Reply,
    messages: list[dict[str, Any]],
    sampling: SamplingParams,
    budget: MemoryBudget,
    changed: asyncio.Event,
) -> None:
    body: dict[str, Any] = {
        "model": reply.model,
        "messages": messages,
        **sampling.common(),
        "max_new_tokens": sampling.max_new_tokens,
        "request_id": reply.request_id,
        "return_token_ids": True,
    }
    began = time.monotonic()
    try:
        async with contextlib.aclosing(client.generate(body)) as chunks:
            async for chunk in chunks:
                reply.text = chunk["text"].lstrip()
                reply.token_ids += chunk.get("token_ids") or ()
                reply.seconds = time.monotonic() - began
                if reply.first_seconds is None and reply.text:
                    reply.first_seconds = reply.seconds
                changed.set()
                if (over := text_length(chat.exchanges) - MOST_TEXT) > 0:
                    reply.text = reply.text[:-over]
                    raise LlavaError(TOO_LONG)
        reply.is_whole = True
    except LlavaError as error:
        reply.error = str(error)
    except ServeError as error:
        reply.error = str(error)
        logger.warning("%s model %s: %s", reply.request_id, reply.model, error.error_type.value)
    except Exception:
        reply.error = str(ServeError(ErrorType.INTERNAL))
        logger.exception("%s failed", reply.request_id)
    finally:
        try:
            budget.take_text(reply, len(reply.text))
        except LlavaError as error:
            reply.text, reply.error, reply.is_whole = "", str(error), False
        changed.set()
