"""Requests that no library would send: raw bytes to a server, and what it says to them."""

import json
import socket
import time
from dataclasses import dataclass

PATIENCE = 60.0


@dataclass
class Said:
    """All that came before the server closed, or fell silent for as long as the attack waited."""

    content: bytes
    is_closed: bool

    @property
    def status(self) -> int | None:
        return int(self.content.split(b" ", 2)[1]) if self.content.startswith(b"HTTP/1.1 ") else None

    @property
    def error(self) -> str | None:
        """The type of the last reply, if it is one of our errors in whole."""
        try:
            error = json.loads(self.content.rpartition(b"\r\n\r\n")[2])["error"]
        except (ValueError, KeyError, TypeError):
            return None
        assert error["message"] and error["request_id"].startswith("req-")
        return error["type"]


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def listen(sock: socket.socket, seconds: float = PATIENCE) -> Said:
    """Read until the server closes, or `seconds` have passed without that."""
    content, deadline = b"", time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            if not (data := sock.recv(65536)):
                return Said(content, True)
            content += data
    except TimeoutError:
        pass
    except ConnectionError:
        return Said(content, True)
    return Said(content, False)


def send(port: int, *parts: bytes, wait: float = 0.0, seconds: float = PATIENCE) -> Said:
    """Send the parts, `wait` seconds apart, until the server closes; then listen."""
    with connect(port) as sock:
        try:
            for number, part in enumerate(parts):
                if number and wait:
                    time.sleep(wait)
                sock.sendall(part)
        except ConnectionError:
            pass
        return listen(sock, seconds)


def head(*lines: str, method: str = "GET", path: str = "/health", host: str = "localhost") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


def credential_lines(credentials: dict[str, str]) -> list[str]:
    return [f"{name}: {value}" for name, value in credentials.items()]


def drip(port: int, first: bytes, more: bytes, seconds: float) -> Said:
    """Send `first`, then `more` twice a second, until the server closes or `seconds` have passed."""
    content, deadline = b"", time.monotonic() + seconds
    with connect(port) as sock:
        sock.sendall(first)
        while time.monotonic() < deadline:
            said = listen(sock, 0.5)
            content += said.content
            try:
                sock.sendall(more)
            except ConnectionError:
                return Said(content, True)
            if said.is_closed:
                return Said(content, True)
    return Said(content, False)
