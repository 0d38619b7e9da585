"""Streaming clients, slow ones and ones that leave, all at once (row 5: CVE-2026-6607): everybody else is served,
every refusal has a type, and no place in the worker stays taken."""

import asyncio
import contextlib
import json

import aiohttp
import httpx
import pytest

from tests.security.conftest import SECRET
from tests.security.wire import Said, credential_lines, head
from tests.serve.processes import wait_until

PATIENCE = 120
FEW = {"streaming": 40, "slow_heads": 20, "slow_bodies": 20, "leaving": 100}
MANY = {"streaming": 200, "slow_heads": 100, "slow_bodies": 100, "leaving": 500}


def question(words):
    return {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": words}], "max_tokens": 500}


async def stream(session, url, words):
    """The whole text of an answer, or the type of the error."""
    async with session.post(url, json=question(words)) as reply:
        if reply.status != 200:
            return (await reply.json())["error"]["type"]
        text, last = "", None
        async for line in reply.content:
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
                if "error" in last:
                    return last["error"]["type"]
                text += last["choices"][0]["delta"].get("content") or ""
            elif line.startswith(b"data: [DONE]"):
                return text
    return "broken off"


async def leave(session, url, **request):
    """Wait for the first words of an answer, then go."""
    async with session.post(url, **request) as reply:
        assert reply.status == 200
        await reply.content.readany()
        reply.close()


async def drip(port, first, more):
    """A byte every second, until the server has had enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        writer.write(first)
        while not reading.done():
            await writer.drain()
            await asyncio.wait([reading], timeout=1.0)
            writer.write(more)
    writer.close()
    with contextlib.suppress(ConnectionError):
        return Said(await reading, True).error
    return "reset"


async def watch_health(urls, is_over, found):
    """Ask all the time, each time over a new connection."""
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), timeout=timeout) as session:
        while not is_over.is_set():
            for url in urls:
                async with session.get(url + "/health") as reply:
                    found.append(reply.status)
            await asyncio.sleep(0.1)


async def attack(stack, counts):
    api = stack["api"]
    url, key = api.url + "/v1/chat/completions", stack.credentials("api")
    begin = head("Content-Length: 5000", *credential_lines(key), method="POST", path="/v1/chat/completions")
    is_over, health = asyncio.Event(), []
    urls = [stack[piece].url for piece in ("controller", "worker", "api")]
    watching = asyncio.create_task(watch_health(urls, is_over, health))
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(connector=connector, headers=key, timeout=timeout) as session:
        answers, heads, bodies, _ = await asyncio.gather(
            asyncio.gather(*(stream(session, url, "so slow") for _ in range(counts["streaming"]))),
            asyncio.gather(*(drip(api.port, b"GET /", b"x") for _ in range(counts["slow_heads"]))),
            asyncio.gather(*(drip(api.port, begin, b" ") for _ in range(counts["slow_bodies"]))),
            asyncio.gather(*(leave(session, url, json=question("now hold")) for _ in range(counts["leaving"]))),
        )
        late = [await stream(session, url, "who comes after") for _ in range(5)]
    is_over.set()
    await watching
    return answers, heads, bodies, health, late


@pytest.mark.parametrize("counts", [FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["few", "many"])
def test_everybody_is_served_beside_the_slow_and_the_leaving(stack, counts):
    answers, heads, bodies, health, late = asyncio.run(attack(stack, counts))
    assert set(answers) == {("echo: so slow " * 100)}
    assert set(heads) == set(bodies) == {"request_timeout"}
    assert len(health) > 30 and set(health) == {200}
    assert late == ["echo: who comes after "] * 5

    def running():
        status = httpx.post(stack["worker"].url + "/worker_get_status", headers={"x-llava-secret": SECRET}, timeout=60)
        return status.json()["stats"]["running"]

    wait_until(lambda: running() == 0, 30)
    metrics = httpx.get(stack["api"].url + "/metrics", headers=stack.credentials("api"), timeout=60).text
    assert "llava_requests_in_flight 0.0" in metrics
    for piece in ("controller", "worker", "api"):
        assert "Traceback" not in stack[piece].log.read_text()


def test_a_server_without_care_keeps_the_places_of_who_has_left(stack):
    async def leave_all():
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(leave(session, stack["open"].url + "/stream") for _ in range(20)))
            await asyncio.sleep(6)
            async with session.get(stack["open"].url + "/running") as reply:
                return (await reply.json())["running"]

    assert asyncio.run(leave_all()) == 20
