"""One archive over HTTP: requested at a limited rate, read as it arrives, tried again when the connection fails."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiolimiter import AsyncLimiter
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

from llava.data.fetching.addresses import is_http, leads_inside
from llava.data.fetching.settings import Limits
from llava.retries import AskedWait, retry_after

USER_AGENT = "llava-med-data/2 (research; fetches figures of open-access articles)"
GONE = {400, 401, 403, 404, 405, 410, 451}
_DRAIN = 1 << 16
_REDIRECTS = 5
_MOST_ASKED = 120.0
"""Seconds that a server may have us wait before the next try."""


class TransferError(Exception):
    """An archive couldn't be had. `permanent`: asking again is no use; else it may be after `seconds`, if known."""

    def __init__(self, reason: str, permanent: bool = False, seconds: float | None = None):
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent
        self.seconds = seconds


class Transfer:
    """Fetches archives over kept-open connections, many at once; an asynchronous context."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.bytes = 0
        """Received so far."""
        # One at a time, evenly: over all connections.
        rate = limits.requests_per_second
        self._rate = AsyncLimiter(1, 1 / rate) if rate else None
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
        if self._rate is not None:
            await self._rate.acquire()
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
            guards = (_guard(url),)
            return await self._session.get(url, max_redirects=_REDIRECTS, proxy=self._proxy(url), middlewares=guards)
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
        """The address that the open-access service gives for an article now; None where it gives none to be asked."""
        async with self.open(f"{service}?id={pmc_id}") as body:
            answer = b""
            while len(answer) < 1 << 20 and (chunk := await body.read()):
                answer += chunk
        # One attribute of one element; a pattern can't be led into expanding entities, as XML parsers can.
        links = re.findall(rb"<link\b[^<>]*", answer)
        archives = (link for link in links if b'format="tgz"' in link)
        link = re.search(rb'\bhref="([^"<>\s]+)"', next(archives, b""))
        if link is None:
            return None
        url = link[1].decode("ascii", "replace").replace("&amp;", "&")
        url = re.sub(r"^ftp://ftp\.ncbi\.", "https://ftp.ncbi.", url)
        return url if is_http(url) and not await leads_inside(service, url) else None

    async def retrying(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Call `attempt` until it raises no TransferError that another try may mend, or the tries are used up.

        Raises:
            TransferError: the last one.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, TransferError) and not error.permanent),
            stop=stop_after_attempt(self.limits.retries + 1),
            wait=AskedWait(self.limits.backoff, most=_MOST_ASKED),
            reraise=True,
        )
        await retrying(attempt)


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


def _guard(url: str) -> aiohttp.ClientMiddlewareType:
    """What sees each request for `url`: the first, and those to which servers send on."""
    first: list[str] = []

    async def see(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        if first and await leads_inside(url, str(request.url)):
            raise TransferError("sent on into one's own network", permanent=True)
        first.append(url)
        return await handler(request)

    return see


def _status_error(response) -> TransferError:
    status = response.status
    if status in GONE:
        return TransferError(f"HTTP {status}", permanent=True)
    return TransferError(f"HTTP {status}", seconds=retry_after(response.headers, _MOST_ASKED))


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
