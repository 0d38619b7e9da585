"""gradio's sessions, one for each open page: whose each is, and what its browser hasn't read yet.

gradio gives a session to whoever knows its name, which stands in addresses, and keeps what a call was answered with
until the browser reads it, however much that is. Needs no gradio.
"""

import asyncio
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

UNREAD_PER_SESSION, UNREAD_IN_ALL = 64 << 20, 256 << 20
"""Bytes of what waits to be read. One answer alone may be larger: the export of many images."""
MOST_MESSAGES = 128
"""That wait for a browser; a call has three or more."""
KNOWN_PER_KEPT = 4
"""Sessions of which it is known whose they are, for each that may be kept: there are two tables of those."""
MOST_CALLS = 32
"""Of a session that haven't ended."""
CALLS_IN_ALL, SMALL_CALL = 128 << 20, 16 << 10
"""Bytes of all calls that haven't ended; a small one always has space, or one visitor's would stop everybody."""


class UnreadMessages(OrderedDict[str, Any]):
    """In the place of gradio's table: queues of messages by session. A session that has too much unread is dropped,
    first those that no browser reads from.

    Args:
        most_sessions: beyond, the one that came first is dropped.
        on_drop: called with the session's name.
        per_session, in_all: bytes.
    """

    def __init__(
        self,
        most_sessions: int,
        on_drop: Callable[[str], None],
        per_session: int = UNREAD_PER_SESSION,
        in_all: int = UNREAD_IN_ALL,
    ):
        super().__init__()
        self.most_sessions, self.on_drop = most_sessions, on_drop
        self.per_session, self.in_all = per_session, in_all
        self._readers: Counter[str] = Counter()

    def __setitem__(self, session: str, messages: asyncio.Queue) -> None:
        """gradio's new queue gives way to one that is counted."""
        while session not in self and len(self) >= self.most_sessions:
            self._drop(next((each for each in self if not self._readers[each]), next(iter(self))))
        super().__setitem__(session, _Messages(self._trim))

    @contextmanager
    def being_read(self, session: str) -> Iterator[None]:
        """While a browser reads the session's messages."""
        self._readers[session] += 1
        try:
            yield
        finally:
            self._readers[session] -= 1
            if not self._readers[session]:
                del self._readers[session]

    def count(self, session: str) -> int:
        """How many messages nobody has read."""
        return self[session].qsize() if session in self else 0

    def _trim(self) -> None:
        for session in [each for each, waiting in self.items() if waiting.size > self.per_session]:
            if self[session].qsize() > 1:
                self._drop(session)
        while sum(each.size for each in self.values()) > self.in_all:
            self._drop(max(self, key=lambda each: (not self._readers[each], self[each].size)))

    def _drop(self, session: str) -> None:
        del self[session]
        self.on_drop(session)


class _Messages(asyncio.Queue):
    """`size` are the bytes of the texts in it; `grown` is called when they are more."""

    def __init__(self, grown: Callable[[], None]):
        super().__init__()
        self.size, self.grown = 0, grown

    def _put(self, item: Any) -> None:
        size = _size(getattr(item, "output", None))
        super()._put((size, item))
        self.size += size
        self.grown()

    def _get(self) -> Any:
        size, item = super()._get()
        self.size -= size
        return item


def _size(value: Any) -> int:
    """Bytes of all texts in what a call was answered with."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return sum(_size(each) for each in value)
    return sys.getsizeof(value) if isinstance(value, (str, bytes)) else 0


class Sessions:
    """All of them.

    Args:
        queue: gradio's, of which the table of messages is replaced.
        most: sessions that it keeps.
        is_kept: whether gradio has a conversation by this name.
    """

    def __init__(self, queue: Any, most: int, is_kept: Callable[[str], bool]):
        self.queue, self.most, self.is_kept = queue, most, is_kept
        self._owners: OrderedDict[str, str | None] = OrderedDict()
        self.unread = queue.pending_messages_per_session = UnreadMessages(most, self._end)

    def belongs(self, session: str, visitor: str | None) -> bool:
        """Whether the session is this visitor's: it is of the first who uses it, for as long as gradio keeps anything
        of it. Visitors without a cookie (None) are one."""
        owner = self._owners.setdefault(session, visitor)
        self._owners.move_to_end(session)
        if len(self._owners) > KNOWN_PER_KEPT * self.most:
            oldest = next((each for each in self._owners if not (each in self.unread or self.is_kept(each))), session)
            del self._owners[oldest]
        return owner == visitor

    def is_busy(self, session: str) -> bool:
        """Whether too much of it waits to be read, or to be done, for another call."""
        calls = sum(event.session_hash == session for event in self.queue.event_ids_to_events.values())
        return self.unread.count(session) >= MOST_MESSAGES or calls >= MOST_CALLS

    def has_space(self, size: int) -> bool:
        """Whether another call of so many bytes may wait."""
        waiting = (_size(event.data.data) for event in self.queue.event_ids_to_events.values() if event.data)
        return size <= SMALL_CALL or sum(waiting) + size <= CALLS_IN_ALL

    def _end(self, session: str) -> None:
        """Its calls answer to nobody any more, and gradio fails with those that try to. Those that wait go."""
        self.queue.pending_event_ids_session.pop(session, None)
        for name, event in list(self.queue.event_ids_to_events.items()):
            if event.session_hash == session:
                event.alive = False
                waiting = self.queue.event_queue_per_concurrency_id[event.concurrency_id].queue
                if event in waiting:
                    waiting.remove(event)
                    del self.queue.event_ids_to_events[name]
