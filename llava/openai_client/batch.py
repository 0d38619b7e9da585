"""The Batch API: all requests in one uploaded file, half the price, answers within a day.

The batch's id is kept in `<output>.batch.json`, so that a killed run goes on waiting for the batch it paid for.
"""

import asyncio
import hashlib
import io
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from llava.errors import LlavaError, library_errors, require
from llava.openai_client.client import NoAnswer, make_client, read_completion, wants_other_fields
from llava.openai_client.jobs import ChatJob, ChatResult, RunSummary
from llava.openai_client.settings import ApiSettings
from llava.openai_client.transport import MOST_FILE, MOST_REPLY
from llava.records import Record, read_json, write_json
from llava.resumable import ResumableJsonl

logger = logging.getLogger(__name__)

_MOST_SECONDS = 3600.0
"""Until a whole reply is there; what a server sends now and then keeps its connection open."""
FINAL_STATES = ("completed", "failed", "expired", "cancelled")


def run_batch(
    todo: Sequence[ChatJob],
    settings: ApiSettings,
    output: ResumableJsonl,
    to_record: Callable[[ChatJob, ChatResult], Record],
    follow_up: Callable[[ChatJob, ChatResult], ChatJob | None] | None,
    summary: RunSummary,
) -> None:
    """Submit `todo` as one batch (or find the one submitted before), wait, and write its answers to `output`. What
    `follow_up` would ask again is counted alone."""
    asyncio.run(_run(todo, settings, output, to_record, follow_up, summary))


async def _run(todo, settings, output, to_record, follow_up, summary) -> None:
    openai = require("openai", "openai")
    state_path = output.path.with_name(output.path.name + ".batch.json")
    try:
        batch = await _answered(state_path, todo, settings, output, to_record, follow_up, summary)
    except (openai.APIError, TimeoutError) as error:
        kept = f"the batch in {state_path} is asked for again" if state_path.exists() else "no batch was submitted"
        raise LlavaError(f"{settings.where}: {error}; mend that and run again: {kept}") from error
    # The batch is spent: what it didn't answer goes into a new one on the next run.
    state_path.unlink()
    if batch.status != "completed":
        logger.warning("batch %s ended as %s", batch.id, batch.status)
    for job in todo:
        if job.key not in output.done and job.key not in summary.failed:
            summary.failed[job.key] = f"not answered by the batch ({batch.status}); run again"


async def _answered(state_path, todo, settings, output, to_record, follow_up, summary):
    """The batch in its final state, what it answered written to `output`."""
    async with make_client(settings, MOST_FILE) as client:
        if state_path.exists():
            state = read_json(state_path)
            _refuse_another(state, todo, settings, state_path)
            logger.info("waiting for batch %s, submitted by an earlier run", state["id"])
        else:
            state = await _submit(client, todo, settings, summary)
            write_json(state_path, state)
        # What only asks may be asked again; a batch that is submitted twice is paid twice.
        client = client.with_options(max_retries=settings.max_retries)
        batch = await _wait(client, state["id"], settings.poll_seconds)
        jobs = {job.key: job for job in todo}
        keys = state["keys"]
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                content = (await _whole(client.files.content(file_id))).content
                # Bytes: an answer may hold other ends of lines (U+2028) than those at which a file of bytes is cut.
                for line in filter(bytes.strip, io.BytesIO(content)):
                    with library_errors(f"{settings.where}: an answer of batch {batch.id} can't be read"):
                        if len(line) > MOST_REPLY:
                            raise ValueError(f"it is larger than {MOST_REPLY:,} bytes")
                        _take(json.loads(line), keys, jobs, settings, output, to_record, follow_up, summary)
    return batch


def _digest(job: ChatJob, settings: ApiSettings) -> str:
    body = json.dumps(job.body(settings.model, settings.reasoning_model), sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def _refuse_another(state: dict, todo: Sequence[ChatJob], settings: ApiSettings, path: Path) -> None:
    """Fail if the batch asks other things under the keys of `todo`: its answers would be taken for these."""
    wanted = {str(job.key): _digest(job, settings) for job in todo}
    sent = {str(state["keys"][name]): digest for name, digest in state.get("requests", {}).items()}
    if any(sent.get(key, digest) != digest for key, digest in wanted.items()):
        raise LlavaError(
            f"{path}: batch {state['id']} is of another run (other requests or another model); finish that one, or "
            f"remove this file to start anew"
        )


async def _submit(client, todo, settings, summary) -> dict:
    tokens = [sum(column) for column in zip(*(job.tokens for job in todo), strict=True)]
    reserved = summary.account.reserve(*tokens)
    if reserved is None:
        raise LlavaError(
            f"a batch of {len(todo)} requests could cost {summary.account.cost(*tokens):.2f} USD, above what is left "
            f"of --max-cost"
        )
    summary.account.release(reserved)  # nothing else is asked meanwhile
    lines = [
        {
            "custom_id": f"item-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": job.body(settings.model, settings.reasoning_model),
        }
        for number, job in enumerate(todo)
    ]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    file = await _whole(client.files.create(file=("requests.jsonl", io.BytesIO(content)), purpose="batch"))
    batch = await _whole(
        client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    )
    summary.account.requests += 1
    return {
        "id": batch.id,
        "keys": {line["custom_id"]: job.key for line, job in zip(lines, todo, strict=True)},
        "requests": {line["custom_id"]: _digest(job, settings) for line, job in zip(lines, todo, strict=True)},
    }


async def _whole(reply: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(_MOST_SECONDS):
            return await reply
    except TimeoutError:
        raise TimeoutError(f"no whole reply within {_MOST_SECONDS:g} s") from None


async def _wait(client, batch_id: str, poll_seconds: float):
    while True:
        batch = await _whole(client.batches.retrieve(batch_id))
        if batch.status in FINAL_STATES:
            return batch
        counts = batch.request_counts
        if counts:
            logger.info("batch %s: %s, %d of %d", batch_id, batch.status, counts.completed, counts.total)
        await asyncio.sleep(poll_seconds)


def _take(line, keys, jobs, settings, output, to_record, follow_up, summary) -> None:
    """Book one line of the batch's output or error file."""
    key = keys.get(line["custom_id"])
    if key not in jobs or key in output.done:
        return
    response = line.get("response") or {}
    if response.get("status_code") != 200:
        error = line.get("error") or (response.get("body") or {}).get("error") or {}
        advice = "; give --reasoning-model" if wants_other_fields(error.get("param"), error.get("code")) else ""
        summary.failed[key] = f"HTTP {response.get('status_code')}: {error.get('message', 'no answer')}{advice}"
        return
    try:
        result = read_completion(response["body"], settings.model)
    except NoAnswer as error:
        summary.account.book(*error.tokens)
        summary.failed[key] = str(error)
        return
    summary.account.book(result.prompt_tokens, result.completion_tokens)
    output.add(to_record(jobs[key], result))
    summary.first_kept += follow_up is not None and follow_up(jobs[key], result) is not None
    summary.done += 1
    summary.refused += result.refused is not None
