"""One archive over HTTP: asked for politely, read as it arrives, tried again when the line fails.

Each worker thread has a `Transfer` of its own, so no connection is ever shared.
"""

import random
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

USER_AGENT = "llava-med-data/2 (research; fetches figures of open-access articles)"
OA_SERVICE = "https://www.ncbi.nlm.nih.gov/pmc/utils/oa/oa.fcgi"
GONE = {400, 401, 403, 404, 405, 410, 451}
_DRAIN = 1 << 16
_SERVERS_KEPT = 4
_MAX_WAIT = 120.0


class TransferError(Exception):
    """An archive couldn't be had. `permanent`: asking again is no use."""

    def __init__(self, reason: str, permanent: bool = False, wait: float | None = None):
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent
        self.wait = wait


@dataclass(frozen=True)
class Limits:
    """How hard to try, and what is too much."""

    timeout: float = 30.0
    """Seconds without a byte."""
    article_timeout: float = 900.0
    """Seconds for one archive."""
    retries: int = 4
    backoff: float = 1.0
    """Seconds before the second try; doubled each time."""
    requests_per_second: float = 3.0
    """0: as fast as it goes."""
    max_picture_bytes: int = 64 << 20
    max_article_bytes: int = 4 << 30
    max_unpacked_bytes: int = 16 << 30


class RateLimit:
    """At most so many requests per second over all threads; 0 is no limit."""

    def __init__(self, per_second: float):
        self._interval = 1 / per_second if per_second else 0.0
        self._next = 0.0
        self._lock = Lock()

    def wait(self, stop: Event) -> None:
        if not self._interval:
            return
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._interval
        stop.wait(max(0.0, start - time.monotonic()))


class Transfer:
    """Fetches archives one after the other over kept-open connections."""

    def __init__(self, limits: Limits, rate: RateLimit, stop: Event):
        self.limits = limits
        self.bytes = 0
        self._rate = rate
        self._stop = stop
        self._managers: dict[str, Any] = {}

    @contextmanager
    def open(self, url: str):
        """The compressed body of an archive as a `read(n)` source; one request.

        Raises:
            TransferError: from here or from a `read`, with a reason fit for the list of failures.
        """
        self._rate.wait(self._stop)
        try:
            response = self._manager(url).request("GET", url, preload_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise TransferError(_reason(error)) from error
        except (ValueError, HTTPException) as error:
            raise TransferError("not an address", permanent=True) from error
        body = Body(response, self.limits, self._stop)
        try:
            if response.status != 200:
                raise _status_error(response)
            yield body
        finally:
            self.bytes += body.received
            _let_go(response)

    def second_source(self, pmc_id: str, service: str) -> str | None:
        """The address that the open-access service gives for an article now, or None."""
        with self.open(f"{service}?id={pmc_id}") as body:
            answer = b""
            while len(answer) < 1 << 20 and (chunk := body.read(1 << 16)):
                answer += chunk
        # One attribute of one element; a pattern can't be led into expanding entities, as XML parsers can.
        link = re.search(rb'<link\b[^>]*\bformat="tgz"[^>]*\bhref="([^"<>\s]+)"', answer)
        if link is None:
            return None
        url = link[1].decode("ascii", "replace").replace("&amp;", "&")
        return re.sub(r"^ftp://ftp\.ncbi\.", "https://ftp.ncbi.", url)

    def pause(self, attempt: int, wait: float | None) -> None:
        """Wait before the next try: as long as the server asked, else doubling, with some chance to spread them."""
        delay = wait if wait is not None else self.limits.backoff * 2**attempt * random.uniform(0.5, 1.0)
        self._stop.wait(min(delay, _MAX_WAIT))

    def close(self) -> None:
        for manager in self._managers.values():
            manager.clear()

    def _manager(self, url: str):
        """The connections to the server of `url`; the proxy of the environment is looked up once per server."""
        parts = urlsplit(url)
        server = parts.scheme, parts.netloc
        if server not in self._managers:
            if len(self._managers) >= _SERVERS_KEPT:
                self._managers.pop(next(iter(self._managers))).clear()
            proxy = getproxies().get(parts.scheme)
            if proxy and proxy_bypass(parts.hostname or ""):
                proxy = None
            settings = {
                "num_pools": 2,
                "maxsize": 1,
                "headers": {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
                "timeout": urllib3.Timeout(connect=self.limits.timeout, read=self.limits.timeout),
                # A failed line is tried again by the caller, who also knows of bodies that break off.
                "retries": urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
            }
            made = urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)
            self._managers[server] = made
        return self._managers[server]


class Body:
    """What is left of a response, with its caps of bytes and time."""

    def __init__(self, response, limits: Limits, stop: Event):
        self.received = 0
        self._response = response
        self._limits = limits
        self._stop = stop
        self._deadline = time.monotonic() + limits.article_timeout

    def read(self, size: int = -1) -> bytes:
        if self._stop.is_set():
            raise TransferError("stopped")
        if time.monotonic() > self._deadline:
            raise TransferError("too slow: the archive took longer than the time allowed for one")
        try:
            chunk = self._response.read1(size if size > 0 else 1 << 16, decode_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise TransferError(_reason(error)) from error
        self.received += len(chunk)
        if self.received > self._limits.max_article_bytes:
            raise TransferError("the archive is larger than the cap", permanent=True)
        return chunk


def _status_error(response) -> TransferError:
    status = response.status
    if status in GONE:
        return TransferError(f"HTTP {status}", permanent=True)
    return TransferError(f"HTTP {status}", wait=_retry_after(response.headers.get("Retry-After")))


def _retry_after(value: str | None) -> float | None:
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _let_go(response) -> None:
    """Keep the connection if little is left to read, else close it: the rest of an archive isn't worth it."""
    left = response.length_remaining
    if left is not None and left <= _DRAIN:
        response.drain_conn()
        response.release_conn()
    else:
        response.close()


def _reason(error: Exception) -> str:
    """The same few words for the same fault, without addresses."""
    known = (
        (urllib3.exceptions.ConnectTimeoutError, "no connection: timed out"),
        (urllib3.exceptions.ReadTimeoutError, "too slow: nothing arrived within the timeout"),
        (urllib3.exceptions.NameResolutionError, "no connection: unknown host"),
        (urllib3.exceptions.NewConnectionError, "no connection"),
        (urllib3.exceptions.SSLError, "no connection: TLS failed"),
        (urllib3.exceptions.IncompleteRead, "the connection was cut"),
        (urllib3.exceptions.ProtocolError, "the connection was cut"),
        (urllib3.exceptions.LocationParseError, "not an address"),
    )
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        return "too many redirects" if "redirect" in str(error.reason) else _reason(error.reason)
    return next((words for kind, words in known if isinstance(error, kind)), type(error).__name__)
