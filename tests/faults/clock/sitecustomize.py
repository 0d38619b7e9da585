"""A clock of the day that a test can set: Python imports this at its start if this folder is in PYTHONPATH.

The file $LLAVA_TEST_CLOCK holds the seconds by which it is wrong, or `jumping`: then it is set anew at every look.
With $LLAVA_TEST_CLOCK_ALL the clock that nobody can set is as wrong, as if it were the other: what the tests of
clocks have to notice. `datetime` reads the true clock: its type can't be replaced.
"""

import os
import random
import time

HOURS = 5 * 3600.0
_true = {name: getattr(time, name) for name in ("time", "time_ns", "monotonic")}
_dice = random.Random(0)


def _error() -> float:
    with open(os.environ["LLAVA_TEST_CLOCK"]) as file:  # noqa: PTH123 (all else is imported later)
        said = file.read()
    return _dice.uniform(-HOURS, HOURS) if said == "jumping" else float(said or 0)


if "LLAVA_TEST_CLOCK" in os.environ:
    time.time = lambda: _true["time"]() + _error()
    time.time_ns = lambda: _true["time_ns"]() + int(_error() * 1e9)
    if "LLAVA_TEST_CLOCK_ALL" in os.environ:
        time.monotonic = lambda: _true["monotonic"]() + _error()
