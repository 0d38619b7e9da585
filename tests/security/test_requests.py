"""What is answered to bodies without end, full queues and addresses that are none."""

import json

import httpx
import pytest

from llava.errors import LlavaError
from llava.serve.protocol import check_address
from tests.security.test_connections import READS_A_BODY

LARGE = 70 << 20


def endless():
    for _ in range(LARGE >> 20):
        yield b" " * (1 << 20)


@pytest.mark.parametrize("piece", ["controller", "worker", "api"])
def test_a_body_without_a_length_is_counted(stack, piece):
    """Row 4. The rest of the refused body is read for a moment, or the client would never see the answer."""
    headers = stack.credentials(piece) | {"content-type": "application/json"}
    reply = httpx.post(stack[piece].url + READS_A_BODY[piece], content=endless(), headers=headers, timeout=60)
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "too_large")
    assert "Traceback" not in stack[piece].log.read_text()


def test_a_plain_server_takes_it_all(stack):
    assert httpx.post(stack["open"].url, content=endless(), timeout=60).json()["body"] == LARGE


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_says_when_to_come_again(stack, stream):
    body = {"model": "scripted", "stream": stream, "messages": [{"role": "user", "content": "full"}]}
    url = stack["api"].url + "/v1/chat/completions"
    reply = httpx.post(url, json=body, headers=stack.credentials("api"), timeout=60)
    assert (reply.status_code, reply.json()["error"]["type"]) == (429, "queue_full")
    assert int(reply.headers["retry-after"]) >= 1


ADDRESSES = ["http://\\ud800:1", "http://ä:1", "http://a b:1", "http://a\\n:1", "http://u:p@a:1", "http://a:1/path"]
ADDRESSES += ["file:///etc:1", "http://a", "http://a:0", "http://a:65536", "http://[::1", "http://a:1?x", "//a:1", ""]


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_is_no_address_is_not_registered(stack, address):
    """Row 1, by whoever has the secret: the controller goes on to name its models."""
    status = '{"model_names": ["m"], "speed": 1, "queue_length": 0}'
    url, headers = stack["controller"].url, stack.credentials("controller")
    content = f'{{"worker_name": "{address}", "worker_status": {status}}}'
    reply = httpx.post(url + "/register_worker", content=content, headers=headers)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "bad_request")
    for route in ("/list_models", "/list_workers"):
        assert "m" not in httpx.post(url + route, headers=headers).json().get("models", [])
    with pytest.raises(LlavaError, match="HOST:PORT"):
        check_address(json.loads(f'"{address}"'))


def test_addresses_have_one_form():
    for given in ("http://GPU-1.lab:21002", "http://gpu-1.lab:21002/", "HTTP://gpu-1.lab:21002"):
        assert check_address(given) == "http://gpu-1.lab:21002"
    assert check_address("https://[2001:DB8::1]:443") == "https://[2001:db8::1]:443"


@pytest.mark.parametrize(
    "status",
    [f'"queue_length": {"9" * 400}', '"queue_length": -1', '"speed": 1e308', '"speed": NaN', f'"speed": {"9" * 400}'],
)
def test_numbers_that_nothing_can_be_reckoned_with_are_refused(stack, status):
    """A worker with the secret would otherwise end the controller's choice for everybody."""
    url, headers = stack["controller"].url, stack.credentials("controller")
    address = "http://127.0.0.1:9"
    begin = f'{{"worker_name": "{address}"'
    content = f'{begin}, "worker_status": {{"model_names": ["counted"], {status}}}}}'
    try:
        reply = httpx.post(url + "/register_worker", content=content, headers=headers)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "bad_request")
        right = f'{begin}, "worker_status": {{"model_names": ["counted"]}}}}'
        assert httpx.post(url + "/register_worker", content=right, headers=headers).status_code == 200
        if "queue" in status:
            reply = httpx.post(url + "/receive_heart_beat", content=f"{begin}, {status}}}", headers=headers)
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "bad_request")
        reply = httpx.post(url + "/get_worker_address", json={"model": "counted"}, headers=headers)
        assert (reply.status_code, reply.json()["address"]) == (200, address)
    finally:
        httpx.post(url + "/unregister_worker", content=begin + "}", headers=headers)
