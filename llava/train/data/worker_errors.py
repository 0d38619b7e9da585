"""What went wrong in a loader's worker, said as if it had gone wrong here."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from llava.errors import LlavaError

_START = "Original Traceback"
_NAME = re.compile(r"llava\.errors\.\w+: ")


@contextmanager
def plain_worker_errors() -> Iterator[None]:
    """Within, a LlavaError of a worker has the message that was raised there, without the traceback torch adds."""
    try:
        yield
    except LlavaError as error:
        text = str(error)
        if _START not in text:
            raise
        # The traceback ends in the error's name and its one line.
        raise LlavaError(_NAME.split(text)[-1].strip()) from None
