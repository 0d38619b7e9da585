"""What a server does beside its requests."""

import asyncio
import ctypes
from pathlib import Path

import psutil
import pytest

from llava.serve.transport.background import repeating
from llava.serve.transport.memory import return_free_memory


@pytest.mark.parametrize("error", [OSError("a full disk"), RecursionError(), AssertionError()])
def test_what_fails_is_logged_and_done_again(caplog, error):
    done = []

    def fails():
        done.append("fails")
        raise error

    async def follows():
        await asyncio.sleep(0)
        done.append("follows")

    async def go():
        async with repeating(0.001, fails, follows):
            while len(done) < 6:
                await asyncio.sleep(0.001)
        seen = len(done)
        await asyncio.sleep(0.05)
        assert len(done) == seen  # no more after the block

    asyncio.run(asyncio.wait_for(go(), 30))
    assert done[:6] == ["fails", "follows"] * 3
    assert "fails failed; it is tried again in 0.001 s" in caplog.text and type(error).__name__ in caplog.text


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc"
)
def test_memory_between_what_is_in_use_goes_back():
    def resident():
        return psutil.Process().memory_info().rss >> 20

    blocks = [b"x" * 60_000 for _ in range(4000)]  # 229 MiB
    kept = blocks[::20]
    blocks.clear()
    before = resident()
    asyncio.run(return_free_memory())
    assert before - resident() > 150 and len(kept) == 200
