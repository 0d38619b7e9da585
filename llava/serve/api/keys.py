"""API keys and their rate limits. A file holds a key per line: `name key [requests per minute]`, `#` for remarks."""

import os
import secrets
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

from llava.errors import LlavaError
from llava.folders import expanded
from llava.serve.protocol import ErrorType, ServeError

VARIABLE = "LLAVA_API_KEYS"
MIN_LENGTH = 8


@dataclass
class Key:
    """A key and its bucket: `tokens` are requests that may come now.

    Apart from the limiters of our own clients (aiolimiter), which wait: a server refuses, and says for how long.
    """

    name: str
    value: str
    per_minute: float | None = None
    tokens: float = 0.0
    filled: float = 0.0

    @property
    def most(self) -> float:
        """Tokens that a key keeps: at least the one that a request takes."""
        return max(1.0, self.per_minute or 0.0)

    def take(self, now: float) -> float:
        """0 if a request may pass, else the seconds until one may."""
        if self.per_minute is None:
            return 0.0
        rate = self.per_minute / 60
        self.tokens = min(self.most, self.tokens + (now - self.filled) * rate)
        self.filled = now
        if self.tokens < 1:
            return (1 - self.tokens) / rate
        self.tokens -= 1
        return 0.0


class Keys:
    """All keys; without any, everybody passes under the name "anyone"."""

    def __init__(self, keys: list[Key], per_minute: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.required = bool(keys)
        self.keys = keys or [Key("anyone", "")]
        self.clock = clock
        for key in self.keys:
            key.per_minute = key.per_minute if key.per_minute is not None else per_minute
            key.tokens, key.filled = key.most, clock()

    def authorize(self, headers: dict[str, str]) -> ServeError | None:
        """For the middleware: None, or what to answer to a request without one of the keys."""
        if self.find(headers) is not None:
            return None
        return ServeError(ErrorType.UNAUTHORIZED, "The API key is missing or wrong.")

    def admit(self, headers: dict[str, str]) -> str:
        """The name of the request's key, one request counted.

        Raises:
            ServeError: RATE_LIMITED, with the seconds to wait.
        """
        key = self.find(headers)
        if key is None:
            raise ServeError(ErrorType.UNAUTHORIZED)
        wait = key.take(self.clock())
        if wait:
            raise ServeError(ErrorType.RATE_LIMITED, retry_after=wait)
        return key.name

    def find(self, headers: dict[str, str]) -> Key | None:
        if not self.required:
            return self.keys[0]
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        # Every key is compared, so that the time taken says nothing about which one was close.
        matches = [key for key in self.keys if secrets.compare_digest(key.value.encode(), given.strip().encode())]
        return matches[0] if matches else None


def read_keys(path: str | None, per_minute: float | None) -> Keys:
    """Keys of a file that its owner alone can read, or of $LLAVA_API_KEYS (separated by commas).

    Raises:
        LlavaError: the file is missing, open to others, or has a line that is no key.
    """
    if per_minute is not None and not 0 < per_minute < 1e9:
        raise LlavaError(f"--requests-per-minute {per_minute:g}: give a number above 0")
    if path is None:
        values = [value.strip() for value in os.environ.get(VARIABLE, "").split(",") if value.strip()]
        keys = [_key(f"key{number}", value, None, f"${VARIABLE}") for number, value in enumerate(values, 1)]
        return Keys(keys, per_minute)
    file = expanded(path)
    try:
        mode, lines = file.stat().st_mode, file.read_text("utf-8").splitlines()
    except OSError as error:
        raise LlavaError(f"key file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LlavaError(f"key file {file} is no text in UTF-8; write a line per key: name key") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LlavaError(f"key file {file} can be read by others; run: chmod 600 {file}")
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) not in (2, 3):
            raise LlavaError(f"{file} line {number}: expected: name key [requests per minute]")
        keys.append(_key(words[0], words[1], words[2] if len(words) == 3 else None, f"{file} line {number}"))
    if not keys:
        raise LlavaError(f"key file {file} holds no key")
    return Keys(keys, per_minute)


def _key(name: str, value: str, per_minute: str | None, where: str) -> Key:
    if len(value) < MIN_LENGTH:
        raise LlavaError(f"{where}: a key has at least {MIN_LENGTH} characters")
    if not value.isascii():
        raise LlavaError(f"{where}: a key has letters and digits of ASCII only, or no client can send it")
    try:
        limit = None if per_minute is None else float(per_minute)
    except ValueError as error:
        raise LlavaError(f"{where}: {per_minute!r} is no number of requests per minute") from error
    if limit is not None and not 0 < limit < 1e9:
        raise LlavaError(f"{where}: requests per minute has to be above 0")
    return Key(name, value, limit)
