"""One archive over HTTP: asked for politely, read as it arrives, tried again when the line fails."""

import asyncio
import random
import re
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

USER_AGENT = "llava-med-data/2 (research; fetches figures of open-access articles)"
OA_SERVICE = "https://www.ncbi.nlm.nih.gov/pmc/utils/oa/oa.fcgi"
GONE = {400, 401, 403, 404, 405, 410, 451}
_DRAIN = 1 << 16
_REDIRECTS = 5
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
    max_image_bytes: int = 64 << 20
    max_article_bytes: int = 4 << 30
    max_unpacked_bytes: int = 16 << 30


class RateLimit:
    """At most so many requests per second over all connections; 0 is no limit."""

    def __init__(self, per_second: float):
        self._interval = 1 / per_second if per_second else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        if self._interval:
            start = max(time.monotonic(), self._next)
            self._next = start + self._interval
            await asyncio.sleep(max(0.0, start - time.monotonic()))


class Transfer:
    """Fetches archives over kept-open connections, many at once; an asynchronous context."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.bytes = 0
        """Received so far."""
        self._rate = RateLimit(limits.requests_per_second)
        self._proxies: dict[str, str | None] = {}

    async def __aenter__(self) -> "Transfer":
        self._session = aiohttp.ClientSession(
            # The caller has as many connections as it asks at once.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.timeout, sock_read=self.limits.timeout),
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    @asynccontextmanager
    async def open(self, url: str):
        """The compressed body of an archive as a source of bytes; one request.

        Raises:
            TransferError: from here or from a `read`, with a reason fit for the list of failures.
        """
        await self._rate.wait()
        try:
            async with asyncio.timeout(self.limits.article_timeout):
                response = await self._get(url)
                body = Body(response, self.limits)
                try:
                    if response.status != 200:
                        await _let_go(response)
                        raise _status_error(response)
                    yield body
                    await _let_go(response)
                finally:
                    self.bytes += body.received
                    response.close()
        except TimeoutError as error:
            raise TransferError("too slow: the archive took longer than the time allowed for one") from error

    async def _get(self, url: str) -> aiohttp.ClientResponse:
        try:
            return await self._session.get(url, max_redirects=_REDIRECTS, proxy=self._proxy(url))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _transfer_error(error) from error
        except ValueError as error:
            raise TransferError("not an address", permanent=True) from error

    def _proxy(self, url: str) -> str | None:
        """The environment's for the server of `url`, looked up once; aiohttp would do it in a thread, each time."""
        server = "/".join(url.split("/", 3)[:3])
        if server not in self._proxies:
            parts = urlsplit(server)
            proxy = getproxies().get(parts.scheme)
            self._proxies[server] = None if proxy and proxy_bypass(parts.hostname or "") else proxy
        return self._proxies[server]

    async def second_source(self, pmc_id: str, service: str) -> str | None:
        """The address that the open-access service gives for an article now, or None."""
        async with self.open(f"{service}?id={pmc_id}") as body:
            answer = b""
            while len(answer) < 1 << 20 and (chunk := await body.read()):
                answer += chunk
        # One attribute of one element; a pattern can't be led into expanding entities, as XML parsers can.
        link = re.search(rb'<link\b[^>]*\bformat="tgz"[^>]*\bhref="([^"<>\s]+)"', answer)
        if link is None:
            return None
        url = link[1].decode("ascii", "replace").replace("&amp;", "&")
        return re.sub(r"^ftp://ftp\.ncbi\.", "https://ftp.ncbi.", url)

    async def pause(self, attempt: int, wait: float | None) -> None:
        """Wait before the next try: as long as the server asked, else doubling, with some chance to spread them."""
        delay = wait if wait is not None else self.limits.backoff * 2**attempt * random.uniform(0.5, 1.0)
        await asyncio.sleep(min(delay, _MAX_WAIT))


class Body:
    """What is left of a response, with its cap of bytes."""

    def __init__(self, response: aiohttp.ClientResponse, limits: Limits):
        self.received = 0
        self._response = response
        self._limits = limits

    async def read(self) -> bytes:
        try:
            chunk = await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _transfer_error(error) from error
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


async def _let_go(response: aiohttp.ClientResponse) -> None:
    """Read what is left if it is little, so that the connection is kept: the rest of an archive isn't worth it."""
    length = response.content_length
    if length is not None and length - response.content.total_bytes <= _DRAIN:
        with suppress(aiohttp.ClientError, aiohttp.ServerTimeoutError):
            await response.read()


def _transfer_error(error: Exception) -> TransferError:
    """The same few words for the same fault, without addresses."""
    for kind, words in _FAULTS:
        if isinstance(error, kind):
            return TransferError(words, permanent=kind in (aiohttp.InvalidURL, aiohttp.TooManyRedirects))
    return TransferError(type(error).__name__)


_FAULTS = (
    (aiohttp.ConnectionTimeoutError, "no connection: timed out"),
    (aiohttp.SocketTimeoutError, "too slow: nothing arrived within the timeout"),
    (aiohttp.ClientConnectorDNSError, "no connection: unknown host"),
    (aiohttp.ClientSSLError, "no connection: TLS failed"),
    (aiohttp.ClientConnectorError, "no connection"),
    (aiohttp.ClientProxyConnectionError, "no connection"),
    (aiohttp.InvalidURL, "not an address"),
    (aiohttp.TooManyRedirects, "too many redirects"),
    (aiohttp.ClientPayloadError, "the connection was cut"),
    (aiohttp.ClientConnectionError, "the connection was cut"),
    (aiohttp.ClientResponseError, "the connection was cut"),
)
"""From the most exact kind to the widest."""
