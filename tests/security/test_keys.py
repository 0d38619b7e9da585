"""Key and secret cover every route and method but /health (row 11)."""

import httpx
import pytest

from tests.security.conftest import KEY, SECRET

ROUTES = {
    "controller": [
        "/register_worker",
        "/unregister_worker",
        "/refresh_all_workers",
        "/list_models",
        "/list_workers",
        "/get_worker_address",
        "/receive_heart_beat",
        "/worker_get_status",
        "/worker_generate_stream",
    ],
    "worker": ["/worker_get_status", "/worker_generate_stream", "/worker_attention_map", "/worker_seen_images"],
    "api": [
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/scripted",
        "/ready",
        "/metrics",
        "/docs",
        "/openapi.json",
    ],
}
SPELLINGS = ["{}", "{}/", "/{}", "{}?x=/health", "/health/..{}", "/health/%2e%2e{}", "/./{}", "{};/health"]
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"]
WRONG = [
    {},
    {"authorization": "Bearer wrong-key-of-some-length", "x-llava-secret": "wrong"},
    {"authorization": f"Basic {KEY}", "x-llava-secret": ""},
    {"authorization": KEY, "x-llava-secret": SECRET[:-1]},
    {"authorization": f"Bearer {KEY}x", "x-llava-secret": SECRET + "x"},
    {"x-forwarded-for": "127.0.0.1", "x-original-url": "/health", "x-real-ip": "127.0.0.1"},
]


@pytest.mark.parametrize(("piece", "route"), [(piece, route) for piece in ROUTES for route in ROUTES[piece]])
def test_every_route_asks_for_it(stack, piece, route):
    with httpx.Client(base_url=stack[piece].url, timeout=60) as client:
        for number, method in enumerate(METHODS):
            reply = client.request(method, route, headers=WRONG[number % len(WRONG)])
            assert reply.status_code == 401, method
        for wrong in WRONG:
            reply = client.post(route, json={"model": "scripted"}, headers=wrong)
            assert (reply.status_code, reply.json()["error"]["type"]) == (401, "unauthorized")
        for number, spelling in enumerate(SPELLINGS):
            path = spelling.format(route)
            request = client.build_request("POST", path)
            request.url = request.url.copy_with(raw_path=path.encode())
            request.headers.update(WRONG[number % len(WRONG)])
            assert client.send(request).status_code == 401, path


@pytest.mark.parametrize("route", ["/v1/models", "/metrics", "/list_models"])
def test_a_plain_server_asks_for_nothing(stack, route):
    assert {httpx.request(method, stack["open"].url + route).status_code for method in METHODS} == {200}


@pytest.mark.parametrize("piece", ROUTES)
def test_the_right_one_opens_and_health_needs_none(stack, piece):
    assert httpx.get(stack[piece].url + "/health").json() == {"status": "ok"}
    headers = stack.credentials(piece)
    replies = [
        httpx.request(method, stack[piece].url + ROUTES[piece][0], headers=headers) for method in ("GET", "POST")
    ]
    assert 401 not in {reply.status_code for reply in replies}
    for secret in (KEY, SECRET):
        assert secret not in stack[piece].log.read_text()
