"""How much of the server's memory all visitors' images may take together."""

import threading
import weakref
from typing import Any

from llava.errors import ImageError


class MemoryBudget:
    """Memory that objects take for as long as they live: until a conversation is cleared or forgotten.

    Args:
        size: bytes in all.
    """

    def __init__(self, size: int):
        self.size = size
        self.taken = 0
        self._lock = threading.RLock()  # an object may go while another one comes

    def take(self, thing: Any, size: int) -> None:
        """Raises an ImageError if too little is left for `size` bytes more."""
        with self._lock:
            if self.taken + size > self.size:
                raise ImageError("The server holds too many images just now. Try again in a few minutes.")
            self.taken += size
        weakref.finalize(thing, self._give_back, size)

    def _give_back(self, size: int) -> None:
        with self._lock:
            self.taken -= size
