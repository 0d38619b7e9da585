"""A worker's memory levels at the budget it was given, whatever is asked and how often."""

import asyncio
import random
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from PIL import Image

from llava.images import png_data_url
from tests.serve.processes import Process
from tests.tiny import make_llava

ENV = {"LLAVA_SERVE_SECRET": "s3cret"}
WORDS = ["yes", "no", "left", "right", "lung"]
ROUNDS, QUESTIONS, AT_ONCE = 10, 200, 64


def resident(process) -> int:
    """MiB."""
    lines = Path(f"/proc/{process.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10


async def ask(process) -> list[int]:
    """Resident memory after each round of different questions about 40 images."""
    dice, noise = random.Random(1), np.random.default_rng(1)
    images = [png_data_url(Image.fromarray(noise.integers(0, 256, (256, 256, 3), np.uint8))) for _ in range(40)]
    turns, found = asyncio.Semaphore(AT_ONCE), []
    async with aiohttp.ClientSession(headers={"x-llava-secret": "s3cret"}) as session:

        async def one():
            body = {"model": "tiny", "images": [dice.choice(images)], "max_new_tokens": 16, "temperature": 1.0}
            body["prompt"] = f"USER: <image>\n{' '.join(dice.choices(WORDS, k=60))} ASSISTANT:"
            async with turns, session.post(process.url + "/worker_generate_stream", json=body) as reply:
                assert b'"finish_reason"' in await reply.read()

        for _ in range(ROUNDS):
            await asyncio.gather(*(one() for _ in range(QUESTIONS)))
            found.append(resident(process))
    return found


@pytest.mark.long
@pytest.mark.parametrize(("budget", "levels"), [("64", True), ("4096", False)])
def test_memory_levels(tmp_path, budget, levels):
    """With a budget that isn't reached, the same questions take more and more: so the measure sees it."""
    words = ["--model-path", str(make_llava(tmp_path)), "--model-name", "tiny", "--no-register", "--device", "cpu"]
    with Process("llava.serve.model_worker", *words, "--cache-mb", budget, env=ENV) as process:
        found = asyncio.run(ask(process.wait()))
    assert (found[-1] - found[1] < 48) == levels, found
