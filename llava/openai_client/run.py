"""Many chat requests: bounded concurrency, retries, rate limits, a limit of money, every answer on disk at once."""

import asyncio
from collections.abc import Callable, Iterator, Sequence

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from llava.errors import LlavaError
from llava.openai_client.batch import run_batch
from llava.openai_client.client import (
    FailedItem,
    NoAnswer,
    RefusedByServer,
    Unreachable,
    UnusableReply,
    make_client,
    request,
)
from llava.openai_client.jobs import ChatJob, ChatResult, RunSummary
from llava.openai_client.limits import RateGate
from llava.openai_client.settings import ApiSettings
from llava.records import Record
from llava.resumable import ResumableJsonl
from llava.retries import AskedWait

_GIVE_UP_AFTER = 8


def run_jobs(
    jobs: Sequence[ChatJob],
    settings: ApiSettings,
    output: ResumableJsonl,
    to_record: Callable[[ChatJob, ChatResult], Record],
    *,
    follow_up: Callable[[ChatJob, ChatResult], ChatJob | None] | None = None,
    progress: str | None = None,
) -> RunSummary:
    """Ask for every job that `output` doesn't hold yet; each result is on disk as soon as it is there.

    Args:
        to_record: the line to write; it must carry the job's key under `output.key`.
        follow_up: a second request for a result that isn't good enough (asked once), or None. Where it fails or is
            refused, or in a batch, which asks once, the first result stands, and the summary counts it.
        progress: title of a progress bar.

    Returns:
        the summary. Items that failed after all retries are not in `output`: the next run asks for them again.

    Raises:
        LlavaError: the server refuses us altogether (wrong key, unknown model, no quota left), or isn't reached for
            `_GIVE_UP_AFTER` items in a row, each with all its tries.
    """
    todo = [job for job in jobs if job.key not in output.done]
    summary = RunSummary(total=len(jobs), resumed=len(jobs) - len(todo), account=settings.account)
    if todo and settings.batch_api:
        run_batch(todo, settings, output, to_record, follow_up, summary)
    elif todo:
        asyncio.run(_run_concurrently(todo, settings, output, to_record, follow_up, progress, summary))
    return summary


async def _run_concurrently(todo, settings, output, to_record, follow_up, progress, summary) -> None:
    from llava.bars import tqdm

    gate = RateGate(settings.requests_per_minute, settings.tokens_per_minute)
    queue: Iterator[ChatJob] = iter(todo)
    bar = tqdm(total=summary.total, initial=summary.resumed, desc=progress, unit="item", disable=progress is None)

    unreachable = 0

    async def worker(client) -> None:
        nonlocal unreachable
        for job in queue:
            try:
                result = await _ask(client, job, settings, gate, summary)
                if result is None:
                    summary.over_budget += 1 + sum(1 for _ in queue)
                    return
                second = follow_up(job, result) if follow_up else None
                if second is not None:
                    result = await _better(client, second, result, settings, gate, summary)
            except FailedItem as error:
                summary.failed[job.key] = str(error)
                unreachable = unreachable + 1 if isinstance(error.__cause__, Unreachable) else 0
                if unreachable >= _GIVE_UP_AFTER:
                    raise LlavaError(
                        f"{settings.where}: {unreachable} items in a row couldn't be asked ({error}); is the server "
                        f"up? What is done is kept: run again to go on"
                    ) from error
            else:
                unreachable = 0
                output.add(to_record(job, result))
                summary.done += 1
                summary.refused += result.refused is not None
            bar.update()
            if summary.account.spent is not None:
                bar.set_postfix_str(f"{summary.account.spent:.3f} USD", refresh=False)

    async with make_client(settings) as client:
        workers = [asyncio.create_task(worker(client)) for _ in range(min(settings.concurrency, len(todo)))]
        try:
            await asyncio.gather(*workers)
        except RefusedByServer as error:
            raise LlavaError(f"{settings.where}: {error}") from error
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            bar.close()


async def _better(client, job: ChatJob, first: ChatResult, settings, gate, summary: RunSummary) -> ChatResult:
    """The answer to a second request, or what the first one gave, which is paid for."""
    try:
        result = await _ask(client, job, settings, gate, summary)
    except FailedItem:
        result = None
    if result is not None and result.refused is None:
        return result
    summary.first_kept += 1
    return first


async def _ask(client, job: ChatJob, settings: ApiSettings, gate: RateGate, summary: RunSummary) -> ChatResult | None:
    """One job with its retries; None when the cost limit forbids it."""
    account = summary.account

    async def attempt() -> ChatResult | None:
        reserved = account.reserve(*job.tokens)
        if reserved is None:
            return None
        try:
            await gate.acquire(sum(job.tokens))
            account.requests += 1
            result = await request(client, job, settings)
            account.book(result.prompt_tokens, result.completion_tokens)
            return result
        except NoAnswer as error:
            account.book(*error.tokens)
            raise
        finally:
            account.release(reserved)

    def before_sleep(state: RetryCallState) -> None:
        summary.retries += 1
        error = state.outcome.exception() if state.outcome else None
        gate.pause(getattr(error, "seconds", None) or 0.0)

    retrying = AsyncRetrying(
        retry=retry_if_exception_type(UnusableReply),
        stop=stop_after_attempt(settings.max_retries + 1),
        wait=AskedWait(settings.backoff),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return await retrying(attempt)
    except UnusableReply as error:
        raise FailedItem(f"{error} (given up after {settings.max_retries + 1} tries)") from error
