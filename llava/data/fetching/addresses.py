"""Which addresses are asked: those of a list as they are; where a server sends on, not those of one's own network."""

import asyncio
import ipaddress
from urllib.parse import urlsplit


def is_http(url: str) -> bool:
    """Whether it is an address of http(s) with a host."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


async def leads_inside(sender: str, url: str) -> bool:
    """Whether the server of `sender`, which lies elsewhere, sends on to this machine or its network: what only they can
    reach may take any request for an order."""
    return await _is_inside(url) and not await _is_inside(sender)


async def _is_inside(url: str) -> bool:
    """Whether one of the host's addresses is no public one. A name that isn't found here is for a proxy to find."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(urlsplit(url).hostname, None)
    except (OSError, ValueError):
        return False
    return not all(_is_public(str(place[0]).partition("%")[0]) for *_, place in found)


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_global
