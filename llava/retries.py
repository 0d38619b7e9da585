"""How long to wait before asking a server again: as long as it said, else longer from try to try, by chance."""

import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from tenacity import RetryCallState, wait_random_exponential
from tenacity.wait import wait_base


class AskedWait(wait_base):
    """tenacity's wait: the `seconds` of the exception that ended the try, where the server named some.

    Else between 0 and `backoff`, twice that after the next try, and so on up to `most` seconds: clients that failed
    together don't return together.
    """

    def __init__(self, backoff: float, most: float = 60.0):
        self._random = wait_random_exponential(multiplier=backoff, max=most)

    def __call__(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = getattr(error, "seconds", None)
        return self._random(state) if asked is None else asked


def retry_after(headers: Mapping[str, str], most: float) -> float | None:
    """Seconds to wait by `Retry-After` (seconds or an HTTP date, RFC 9110 10.2.3) or OpenAI's `retry-after-ms`.

    At most `most` of them, whatever a server asks for.

    A date is taken by the server's own clock where it tells that (`Date`): ours may be hours off. None where there is
    neither or it can't be read. Names of `headers` are found whatever their case.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            pass
        else:
            return min(max(0.0, seconds), most) if math.isfinite(seconds) else None
        try:
            now = time.time()  # noqa: TID251
            if "date" in headers:
                now = parsedate_to_datetime(headers["date"]).timestamp()
            return min(max(0.0, parsedate_to_datetime(value).timestamp() - now), most)
        except (ValueError, TypeError):
            continue
    return None
