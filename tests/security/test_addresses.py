"""Addresses and paths that a client names are neither asked nor read (rows 1 and 2: CVE-2024-9309, CVE-2024-10044,
CVE-2026-85695, CVE-2024-11449, CVE-2024-12065, CVE-2024-12068, CVE-2026-24779, CVE-2026-25960)."""

import httpx
import pytest

from tests.security.page_visitor import listener
from tests.serve.processes import Process

WORDS = "what only the server's owner may read"
TARGETS = ["http", "file", "path"]


@pytest.fixture(params=TARGETS)
def target(request, tmp_path):
    """Something that only the server can reach, and whether it was reached."""
    secret = tmp_path / "secret.txt"
    secret.write_text(WORDS)
    with listener() as (address, asked):
        names = {"http": f"{address}/secret.png", "file": f"file://{secret}", "path": str(secret)}
        yield names[request.param], asked


def image(target):
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": target}}, {"type": "text", "text": "?"}],
    }


def worker_bodies(target):
    yield {"model": "scripted", "prompt": "<image> ?", "images": [target]}
    yield {"model": "scripted", "messages": [image(target)]}
    named = {"worker_addr": target, "worker_address": target, "worker_name": target, "controller_addr": target}
    yield {"model": "no-such", "prompt": "hello", **named}


def attacks(target):
    """(piece, route, body) of each."""
    for body in worker_bodies(target):
        yield "controller", "/worker_generate_stream", body
        yield "worker", "/worker_generate_stream", body
    yield "worker", "/worker_attention_map", {"model": "scripted", "messages": [image(target)], "token_ids": [1]}
    yield "worker", "/worker_seen_images", {"model": "scripted", "messages": [image(target)]}
    yield "api", "/v1/chat/completions", {"model": "scripted", "messages": [image(target)]}
    yield "api", "/v1/chat/completions", {"model": target, "messages": [{"role": "user", "content": "hello"}]}
    yield "controller", "/get_worker_address", {"model": "scripted", "exclude": [target]}


def test_nothing_that_a_client_names_is_reached(stack, target):
    target, asked = target
    for piece, route, body in attacks(target):
        reply = httpx.post(stack[piece].url + route, json=body, headers=stack.credentials(piece), timeout=60)
        assert WORDS not in reply.text and reply.status_code in (200, 400, 404, 503)
        if "image" in str(body):
            assert "error" in reply.text, (piece, route, reply.text)
    assert asked == []


def test_a_server_without_care_reaches_it(stack, target):
    target, asked = target
    for _, _, body in attacks(target):
        reply = httpx.post(stack["open"].url + "/fetch", json=body, timeout=60)
        assert asked or WORDS in reply.text
        asked.clear()


WITHOUT_SECRET = ["/register_worker", "/unregister_worker", "/receive_heart_beat", "/refresh_all_workers"]


@pytest.mark.parametrize("route", WITHOUT_SECRET)
def test_a_stranger_registers_nothing(stack, route):
    """Without its status the controller asks a worker for it: whoever may register, may have addresses asked."""
    with listener() as (address, asked):
        for headers in ({}, {"x-llava-secret": "wrong"}, {"x-llava-secret": ""}):
            reply = httpx.post(stack["controller"].url + route, json={"worker_name": address}, headers=headers)
            assert (reply.status_code, reply.json()["error"]["type"]) == (401, "unauthorized")
        assert asked == []
    models = httpx.post(stack["controller"].url + "/list_models", headers=stack.credentials("controller"))
    assert models.json()["models"] == ["scripted"]


def test_an_open_controller_gives_a_models_name_to_one_machine():
    status = {"model_names": ["m"], "speed": 1, "queue_length": 0}
    with Process("llava.serve.controller", "--open-to-everyone") as controller:
        url = controller.wait().url + "/register_worker"

        def register(address):
            return httpx.post(url, json={"worker_name": address, "worker_status": status}).status_code

        assert register("http://10.1.1.1:21002") == 200
        assert register("http://10.6.6.6:21002") == 400
        assert register("http://10.1.1.1:21003") == 200
