"""Under which names a server answers, and to pages of which sites.

A hostile page can give its own name the address of a server in the visitor's network (DNS rebinding); the browser
then takes that server for the page's own. Its requests still carry the page's name as `Host`, so names that nobody
gave to this server are refused. Addresses in numbers can't be bound anew and are always allowed.
"""

import ipaddress
import re
import socket
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import urlsplit

from llava.serve.protocol import ErrorType, ServeError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Where a server listens that this machine alone reaches."""
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:/@?#\s]*)(:\d{1,5})?", re.IGNORECASE)


def add_host_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which this server is reached, as by way of a proxy; several times for several. "
        "Addresses, localhost and this machine's own name need none",
    )


@dataclass(frozen=True)
class Hosts:
    """`given` are the names that whoever runs the server has allowed, lower case."""

    given: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Hosts":
        return cls(frozenset(name.strip().lower().rstrip(".") for name in names if name))

    @classmethod
    def from_args(cls, args: Namespace, *more: str | None) -> "Hosts":
        """--allowed-host, the name to listen at, and others that the server is known by."""
        known = [name for name in (args.host, *more) if name and name != "localhost" and not _is_address(name)]
        return cls.of([*args.allowed_host, *known])

    def check(self, headers: Mapping[str, str]) -> ServeError | None:
        """None, or what to answer to a request with these headers (lower-case names)."""
        host = headers.get("host", "").lower()
        found = _HOST.fullmatch(host)
        if found is None or not self._is_ours(found["name"].rstrip(".")):
            return ServeError(ErrorType.UNKNOWN_HOST)
        origin = headers.get("origin")
        if origin is not None and not self._is_our_page(origin.lower(), host):
            return ServeError(ErrorType.FOREIGN_ORIGIN)
        return None

    def _is_ours(self, name: str) -> bool:
        # Without a name it isn't a browser's request.
        return name in ("", "localhost") or name in self.given or name in _own_names() or _is_address(name)

    def _is_our_page(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and (parts.netloc == host or name in self.given)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


@cache
def _own_names() -> frozenset[str]:
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return frozenset({name, short, f"{short}.local"})
