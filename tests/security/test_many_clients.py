"""Streaming clients, slow ones and ones that leave, all at once (row 5: CVE-2026-6607): everybody else is served,
every refusal has a type, and no place in the worker stays taken."""

import asyncio
import json

import aiohttp
import httpx
import pytest

from tests.security.conftest import SECRET
from tests.security.crowds import drip, leave, stream
from tests.security.wire import credential_lines, head
from tests.serve.health import HealthWatch, latencies
from tests.serve.processes import wait_until

PATIENCE = 120
SERVERS = ("controller", "worker", "api", "page")
FEW = {"streaming": 40, "slow_heads": 20, "slow_bodies": 20, "leaving": 100}
MANY = {"streaming": 200, "slow_heads": 100, "slow_bodies": 100, "leaving": 500}


def question(words):
    return {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": words}], "max_tokens": 500}


async def attack(stack, counts):
    api = stack["api"]
    url, key = api.url + "/v1/chat/completions", stack.credentials("api")
    begin = head("Content-Length: 5000", *credential_lines(key), method="POST", path="/v1/chat/completions")
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(connector=connector, headers=key, timeout=timeout) as session:
        answers, heads, bodies, left = await asyncio.gather(
            asyncio.gather(*(stream(session, url, question("so slow")) for _ in range(counts["streaming"]))),
            asyncio.gather(*(drip(api.port, b"GET /", b"x") for _ in range(counts["slow_heads"]))),
            asyncio.gather(*(drip(api.port, begin, b" ") for _ in range(counts["slow_bodies"]))),
            asyncio.gather(*(leave(session, url, json=question("now hold")) for _ in range(counts["leaving"]))),
        )
        late = [await stream(session, url, question("who comes after")) for _ in range(5)]
    return answers, heads, bodies, left, late


@pytest.mark.parametrize("counts", [FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["few", "many"])
def test_everybody_is_served_beside_the_slow_and_the_leaving(stack, counts):
    with HealthWatch({piece: stack[piece].url for piece in SERVERS}) as health:
        answers, heads, bodies, left, late = asyncio.run(attack(stack, counts))
    assert set(answers) == {("echo: so slow " * 100)}
    assert set(heads) == set(bodies) == {"request_timeout"}
    assert set(left) == {200}
    assert len(health.looks) > 30 and {look.status for look in health.looks} == {200}
    print(json.dumps({"clients": counts, "health_ms": latencies(health.looks)}))  # pytest -s shows it
    assert late == ["echo: who comes after "] * 5

    def running():
        status = httpx.post(stack["worker"].url + "/worker_get_status", headers={"x-llava-secret": SECRET}, timeout=60)
        return status.json()["stats"]["running"]

    wait_until(lambda: running() == 0, 30)
    metrics = httpx.get(stack["api"].url + "/metrics", headers=stack.credentials("api"), timeout=60).text
    assert "llava_requests_in_flight 0.0" in metrics
    for piece in SERVERS:
        assert "Traceback" not in stack[piece].log.read_text()


def test_a_server_without_care_keeps_the_places_of_who_has_left(stack):
    async def leave_all():
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(leave(session, stack["open"].url + "/stream") for _ in range(20)))
            await asyncio.sleep(6)
            async with session.get(stack["open"].url + "/running") as reply:
                return (await reply.json())["running"]

    assert asyncio.run(leave_all()) == 20
