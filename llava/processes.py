"""Processes that work for a command, and end when it does, however it ends."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any


def process_pool(
    workers: int, initializer: Callable[..., None] | None = None, initargs: tuple = (), start: str | None = None
) -> ProcessPoolExecutor:
    """A pool whose processes don't outlive this one, not even where it is killed.

    Args:
        initializer: called with `initargs` in each new process.
        start: `fork`, `spawn` or `forkserver`; None for the platform's own way.
    """
    return ProcessPoolExecutor(
        workers, mp_context=get_context(start), initializer=_begin, initargs=(initializer, initargs)
    )


def _begin(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a process of a pool has a parent"
    parent.join()
    os._exit(1)
