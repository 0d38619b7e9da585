"""How much of the server's memory all visitors' conversations may take together, and the drawn views in the rest."""

import asyncio
import contextlib
import itertools
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from llava.errors import ImageError
from llava.serve.decoding.pool import DecodingPool, in_thread
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.web.chat_state import UploadedImage
from llava.serve.web.scans import DrawnView, Scan

PER_VISITOR = 64 << 20
"""Bytes of drawn views that are kept for a visitor: some 1,000 slices of 512 x 512 with noise."""
BYTES_PER_CHARACTER = 16
"""Of a conversation's texts: themselves, and escaped in what gradio keeps of the two sides that it has shown."""
MOST_LOOKS, MOST_WAITING = 4, 64
"""Of a visitor: drawn at the same time, for all share the threads and processes that open images; waiting for it. A
page asks for one slice at a time, and for a view with each of its sliders."""
LOOK_SECONDS = 20.0
"""For a view, with waiting for those of others."""


class MemoryBudget:
    """Memory that objects take for as long as they live: until a conversation is cleared or forgotten.

    Args:
        size: bytes in all.
    """

    def __init__(self, size: int):
        self.size = size
        self.taken = 0
        self.make_way: Callable[[], bool] = lambda: False
        """Asked, while too little is left, to let go of something; False if there is nothing."""
        self.lock = threading.RLock()  # an object may go while another one comes

    def take(self, thing: Any, size: int) -> None:
        """Raises an ImageError if too little is left for `size` bytes more."""
        with self.lock:
            while self.taken + size > self.size and self.make_way():
                pass
            if self.taken + size > self.size:
                raise ImageError("The server holds too many images and texts just now. Try again in a few minutes.")
            self.taken += size
        weakref.finalize(thing, self._give_back, size)

    def take_text(self, thing: Any, length: int) -> None:
        """The same for `length` characters that `thing` holds."""
        self.take(thing, length * BYTES_PER_CHARACTER)

    def _give_back(self, size: int) -> None:
        with self.lock:
            self.taken -= size


@dataclass
class _Looks:
    """Of a visitor: those that are drawn or wait, and the turns to be drawn."""

    wanted: int = 0
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_LOOKS))


class DrawnViews:
    """Draws views of scans, and keeps them with their scans, so that a slice seen before isn't drawn anew. They take
    what a budget has left; the one used least recently goes first: for another image of anybody's, or beyond
    `per_visitor` bytes for another view of the same visitor's."""

    def __init__(self, pool: DecodingPool, budget: MemoryBudget, per_visitor: int = PER_VISITOR):
        self.pool, self.budget, self.per_visitor = pool, budget, per_visitor
        self._scans: weakref.WeakValueDictionary[str, Scan] = weakref.WeakValueDictionary()
        self._kept: weakref.WeakSet[DrawnView] = weakref.WeakSet()
        self._uses = itertools.count(1)
        self._looks: dict[str, _Looks] = {}
        budget.make_way = self._forget_oldest

    def add(self, scan: Scan, visitor: str) -> None:
        """From now on the visitor, and nobody else, finds the scan by its name, for as long as it lives."""
        scan.visitor = visitor
        self._scans[scan.name] = scan

    def find(self, name: str, visitor: str) -> Scan | None:
        """The scan of this name if it is this visitor's."""
        scan = self._scans.get(name)
        return scan if scan is not None and scan.visitor == visitor else None

    async def draw(self, scan: Scan, place: int | None = None) -> DrawnView:
        """`Scan.draw`; what is drawn anew is kept.

        Raises:
            LlavaError, ServeError: it can't be opened, there is no such slice, or the visitor wants too many at once.
        """
        async with self._turn(scan.visitor):
            view = await in_thread(scan.draw, self.pool, place, seconds=LOOK_SECONDS)
        self.keep(view, scan)
        return view

    async def image(self, scan: Scan) -> UploadedImage:
        """`Scan.view`; raises as `draw`."""
        async with self._turn(scan.visitor):
            return await in_thread(scan.view, self.pool, seconds=LOOK_SECONDS)

    @contextlib.asynccontextmanager
    async def _turn(self, visitor: str) -> AsyncIterator[None]:
        looks = self._looks.setdefault(visitor, _Looks())
        if looks.wanted >= MOST_LOOKS + MOST_WAITING:
            raise ServeError(ErrorType.QUEUE_FULL)
        looks.wanted += 1
        try:
            async with looks.turns:
                yield
        finally:
            looks.wanted -= 1
            if not looks.wanted:
                del self._looks[visitor]

    def keep(self, view: DrawnView, scan: Scan) -> None:
        """Keep a view of `scan`, which was added, that was just used. One that finds no space isn't kept."""
        with self.budget.lock:
            view.used = next(self._uses)
            if view in self._kept or view.size > self.per_visitor:
                return
            scans = [each for each in self._scans.values() if each.visitor == scan.visitor]
            own = [each for one in scans for each in one.drawn.values()]
            while sum(each.size for each in own) + view.size > self.per_visitor:
                self._forget(own.pop(own.index(min(own, key=_used))))
            with contextlib.suppress(ImageError):
                self.budget.take(view, view.size)
                scan.drawn[view.source] = view
                view.home = scan.drawn
                self._kept.add(view)

    def _forget_oldest(self) -> bool:
        oldest = min(self._kept, key=_used, default=None)
        if oldest is None:
            return False
        self._forget(oldest)
        return True

    def _forget(self, view: DrawnView) -> None:
        self._kept.discard(view)
        if view.home.get(view.source) is view:  # not one that was drawn anew meanwhile
            del view.home[view.source]


def _used(view: DrawnView) -> int:
    return view.used
