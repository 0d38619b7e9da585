"""Progress bars: tqdm's, by a clock that nobody sets.

Its own is the clock of the day: put back by an hour, a bar would stand still for that hour.
"""

import time

from tqdm import _monitor, std, tqdm  # noqa: TID251

std.time = _monitor.time = time.monotonic  # where each bar, and the thread that watches them, take it from

__all__ = ["tqdm"]
