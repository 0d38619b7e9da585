"""What a server no longer needs goes back to the system, so that what it takes doesn't grow with the days.

glibc keeps what was freed; on other systems nothing is done.
"""

import asyncio
import contextlib
import ctypes

RETURNED_BYTES = 1 << 20
RETURN_SECONDS = 30.0
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def return_large_blocks() -> None:
    """From now on blocks of `RETURNED_BYTES` go back as soon as they are free.

    glibc keeps those of up to 32 MB once one has been freed: bodies with images then lie between what lives longer,
    and a server takes several times what its largest moment took.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, RETURNED_BYTES)


async def return_free_memory() -> None:
    """Whole pages between smaller blocks that are in use go back now: milliseconds, beside the event loop."""
    with contextlib.suppress(OSError, AttributeError):
        await asyncio.to_thread(ctypes.CDLL(None).malloc_trim, 0)
