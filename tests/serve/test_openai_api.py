"""The API over real sockets with OpenAI's own client: answers, streams, keys, limits, and every kind of failure."""

import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import threading

import httpx
import openai
import pytest
from PIL import Image

from llava.errors import LlavaError
from llava.serve.api.keys import Key, Keys, read_keys
from llava.serve.api.metrics import Metrics
from llava.serve.protocol import ServeError
from tests.serve.processes import Process, wait_until

ENV = {"LLAVA_SERVE_SECRET": "s3cret", "LLAVA_API_KEYS": "key-for-tests"}
ASK = [{"role": "user", "content": "one two"}]


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """(API, worker, path of the API's log), a scripted worker behind a controller."""
    log = tmp_path_factory.mktemp("api") / "log"
    with Process("llava.serve.controller", env=ENV) as controller:
        controller.wait()
        with (
            Process("tests.serve.scripted_worker", "--controller", controller.url, env=ENV) as worker,
            Process("llava.serve.openai_api_server", "--controller", controller.url, env=ENV, log=log) as api,
        ):
            worker.wait()
            api.wait()
            wait_until(lambda: get(api, "/ready").status_code == 200, 20)
            yield api, worker, log


@pytest.fixture
def client(serving):
    with connect(serving[0]) as client:
        yield client


def connect(api, key="key-for-tests"):
    return openai.OpenAI(base_url=api.url + "/v1", api_key=key, max_retries=0)


def get(api, path, key="key-for-tests"):
    return httpx.get(api.url + path, headers={"authorization": f"Bearer {key}"})


def data_url(size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_starts_without_torch():
    script = (
        "import sys, llava.serve.openai_api_server as s, llava.serve.client as c, llava.serve.api.keys as k\n"
        "s.build_app(c.ServingClient('http://localhost:1', None), k.Keys([]))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_answer(client):
    reply = client.chat.completions.create(model="scripted", messages=ASK)
    assert reply.choices[0].message.content == "echo: one two "
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (2, 3, 5)
    assert reply._request_id == "req-" + reply.id.removeprefix("chatcmpl-")


def test_a_stream_with_usage(client):
    options = {"include_usage": True}
    with client.chat.completions.create(model="scripted", messages=ASK, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == "echo: one two "
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 3


def test_several_choices_and_logprobs(client):
    reply = client.chat.completions.create(
        model="scripted", messages=ASK, n=3, logprobs=True, top_logprobs=1, max_tokens=2
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {"echo: one "}
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    first = reply.choices[1].logprobs.content[0]
    assert (first.token, first.logprob, first.top_logprobs[0].token) == ("echo: ", -0.5, "echo:")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 6)
    with client.chat.completions.create(model="scripted", messages=ASK, n=2, logprobs=True, stream=True) as stream:
        texts = {0: "", 1: ""}
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content
            assert chunk.choices[0].logprobs is not None
    assert texts == {0: "echo: one two ", 1: "echo: one two "}


def test_images_reach_the_worker(client):
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    content = [image, {"type": "text", "text": "compare"}, image]
    reply = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": content}])
    assert reply.choices[0].message.content == "echo: <image> compare <image> "


@pytest.mark.parametrize(
    ("word", "status", "kind"),
    [
        ("oom", 507, "out_of_memory"),
        ("context", 400, "context_too_long"),
        ("full", 429, "queue_full"),
        ("image", 400, "bad_image"),
        ("crash", 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_each_failure_has_its_status_and_words(client, word, status, kind, stream):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": word}], stream=stream)
    assert (caught.value.status_code, caught.value.type) == (status, kind)
    assert caught.value.body["request_id"] == caught.value.request_id
    assert caught.value.body["message"] and "0x" not in caught.value.body["message"]


def test_an_unknown_model_and_fields_that_cannot_be_honoured(client):
    for words, more in (
        ("The model 'none' doesn't exist", {"model": "none"}),
        ("tool_choice: auto is not supported", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("response_format.type: Input should be", {"response_format": {"type": "xml"}}),
        ("frequency_penalty: not supported", {"frequency_penalty": 1.0}),
        ("no_such: unknown field", {"extra_body": {"no_such": 1}}),
        ("temperature: ", {"temperature": -1}),
        ("top_logprobs: needs", {"top_logprobs": 2}),
        ("n: ", {"n": 17}),
        (r"messages.0.role: Input should be", {"messages": [{"role": "robot", "content": "x"}]}),
    ):
        with pytest.raises(openai.APIStatusError, match=words) as caught:
            client.chat.completions.create(**{"model": "scripted", "messages": ASK} | more)
        assert caught.value.status_code == (404 if "doesn't exist" in words else 400)
    client.chat.completions.create(model="scripted", messages=ASK, frequency_penalty=0, user="u", store=False)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "https://localhost/x.png", "file:///etc/passwd"])
def test_addresses_of_images_are_not_fetched(client, url):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError, match="nothing is fetched"):
        client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": content}])


def test_the_key_covers_everything_but_liveness(serving):
    api = serving[0]
    for path in ("/v1/models", "/v1/models/x", "/ready", "/metrics", "/v1/chat/completions", "/docs", "/openapi.json"):
        for key in ("wrong", "key-for-test"):
            reply = get(api, path, key)
            assert (reply.status_code, reply.json()["error"]["type"]) == (401, "unauthorized"), path
            assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]
    assert httpx.get(api.url + "/health").status_code == 200
    with connect(api, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_models_and_metrics(serving, client):
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").id == "scripted"
    client.chat.completions.create(model="scripted", messages=ASK)
    text = get(serving[0], "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['llava_requests_total{model="scripted",status="ok"}']) >= 1
    assert float(values["llava_completion_tokens_total"]) >= 3
    assert float(values["llava_time_to_first_token_seconds_count"]) >= 1
    assert float(values["llava_workers"]) == 1
    assert any(name.startswith("llava_worker_queue_length{") for name in values)


def test_a_client_that_leaves_frees_the_worker(serving, client):
    def running():
        return get_stats(serving[1])["running"]

    slow = [{"role": "user", "content": "be slow"}]
    stream = client.chat.completions.create(model="scripted", messages=slow, stream=True)
    next(iter(stream))
    assert running() == 1
    stream.close()
    wait_until(lambda: running() == 0, 5)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model="scripted", messages=slow)
    wait_until(lambda: running() == 0, 5)


def test_health_answers_while_answers_run(serving, client):
    slow = [{"role": "user", "content": "be slow"}]
    with client.chat.completions.create(model="scripted", messages=slow, stream=True) as stream:
        next(iter(stream))
        for process in serving[:2]:
            assert httpx.get(process.url + "/health", timeout=2).status_code == 200


def test_nothing_that_was_said_is_logged(serving, client):
    client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "Mrs Miller's scan"}])
    lines = serving[2].read_text().splitlines()
    assert sum("Uvicorn running on http://127.0.0.1:" in line for line in lines) == 1  # its own address
    text = "\n".join(line for line in lines if "Uvicorn running" not in line)
    assert "req-" in text and "key1" in text
    assert "Miller" not in text and "127.0.0.1" not in text and "key-for-tests" not in text


def test_large_bodies_and_many_headers_are_refused(serving):
    api = serving[0]
    key = {"authorization": "Bearer key-for-tests"}
    body = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": "x" * (65 << 20)}]}).encode()
    with contextlib.suppress(httpx.TransportError):  # closed while we were still sending, which is as good
        assert httpx.post(api.url + "/v1/chat/completions", content=body, headers=key).status_code == 413
    many = key | {f"x-{number}": "y" for number in range(200)}
    assert httpx.get(api.url + "/v1/models", headers=many).status_code == 431
    assert httpx.get(api.url + "/health").status_code == 200


def test_rate_limits_are_per_key(serving, tmp_path):
    path = tmp_path / "keys"
    path.write_text("# name key limit\nslow key-of-slow 2\nfast key-of-fast\n")
    path.chmod(0o600)
    controller = "http://127.0.0.1:1"
    with Process(
        "llava.serve.openai_api_server", "--controller", controller, "--api-key-file", str(path), env=ENV
    ) as api:
        api.wait()
        with connect(api, "key-of-slow") as slow, connect(api, "key-of-fast") as fast:
            for limited in (False, False, True):
                with pytest.raises(openai.APIStatusError) as caught:
                    slow.chat.completions.create(model="m", messages=ASK)
                assert caught.value.status_code == (429 if limited else 503)
            assert caught.value.type == "rate_limited"
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
            for _ in range(4):
                with pytest.raises(openai.InternalServerError, match="The controller can't be reached"):
                    fast.chat.completions.create(model="m", messages=ASK)


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("a key-of-slow", 0o644, "chmod 600"),
        ("", 0o600, "holds no key"),
        ("a short", 0o600, "at least 8"),
        ("a key-of-slow x", 0o600, "no number"),
        ("a", 0o600, "line 1"),
        ("é key-of-slow", 0o600, "UTF-8"),
        ("a schl\xc3\xbcssel", 0o600, "of ASCII only"),
    ],
)
def test_bad_key_files_stop_the_server(tmp_path, text, mode, words):
    path = tmp_path / "keys"
    path.write_text(text, encoding="latin-1")
    path.chmod(mode)
    command = [sys.executable, "-m", "llava.serve.openai_api_server", "--api-key-file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize("per_minute", [0.5, 1, 3])
def test_a_key_has_as_many_requests_as_it_says(per_minute):
    now = [0.0]
    keys = Keys([Key("a", "key-of-slow", per_minute)], None, lambda: now[0])
    admitted = 0
    for second in range(3600):
        now[0] = float(second)
        with contextlib.suppress(ServeError):
            admitted += bool(keys.admit({"authorization": "Bearer key-of-slow"}))
    assert 58 * per_minute <= admitted <= 60 * per_minute + max(1, per_minute)


@pytest.mark.parametrize("per_minute", [0.0, -5.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(per_minute):
    with pytest.raises(LlavaError, match=r"--requests-per-minute .*: give a number above 0"):
        read_keys(None, per_minute)


def test_metrics_tell_no_address():
    worker = {"address": "http://10.0.0.7:21002", "model_names": ["m"], "stats": {"running": 1, "waiting": 2}}
    metrics = Metrics()
    text = metrics.text([worker, worker | {"address": "http://10.0.0.8:21002"}]).decode()
    assert "10.0.0" not in text and "21002" not in text
    names = re.findall(r'llava_worker_running{model="m",worker="(\w+)"} 1', text)
    assert len(set(names)) == 2 and all(
        f'llava_worker_waiting{{model="m",worker="{name}"}} 2' in text for name in names
    )
    assert text == metrics.text([worker, worker | {"address": "http://10.0.0.8:21002"}]).decode()


def test_other_machines_need_a_key_or_a_flag(monkeypatch):
    command = [sys.executable, "-m", "llava.serve.openai_api_server", "--host", "0.0.0.0"]
    monkeypatch.delenv("LLAVA_API_KEYS", raising=False)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--no-api-key" in done.stderr


def test_a_worker_killed_in_the_middle_is_said_and_the_others_go_on():
    with Process("llava.serve.controller", env=ENV) as controller:
        controller.wait()
        with Process("llava.serve.openai_api_server", "--controller", controller.url, env=ENV) as api:
            api.wait()
            started = ["tests.serve.scripted_worker", "--controller", controller.url, "--pause", "0.05"]
            with Process(*started, env=ENV) as first, Process(*started, env=ENV) as second, connect(api) as client:
                first.wait()
                second.wait()
                wait_until(lambda: len(workers(controller)) == 2, 20)
                outcomes = []

                def ask(number):
                    try:
                        words = [{"role": "user", "content": " ".join(["w"] * 20)}]
                        with client.chat.completions.create(model="scripted", messages=words, stream=True) as stream:
                            text = "".join(chunk.choices[0].delta.content for chunk in stream)
                        outcomes.append(text.count("w"))
                    except openai.APIError as error:
                        outcomes.append(error.body["type"])

                threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
                for thread in threads:
                    thread.start()
                wait_until(lambda: get_stats(first)["running"] >= 1 and get_stats(second)["running"] >= 1, 10)
                hit = get_stats(first)["running"]
                first.kill()
                for thread in threads:
                    thread.join()
                assert outcomes.count(20) >= 8 - hit - 1
                assert set(outcomes) == {20, "worker_lost"}
                for _ in range(4):
                    ask(0)
                assert outcomes[-4:] == [20] * 4, "requests after the kill go to the worker that is left"


def test_ten_kills_under_load_lose_only_what_was_being_said():
    """Unstreamed answers are asked for again elsewhere; of the streamed ones only those on the killed worker end."""
    with Process("llava.serve.controller", env=ENV) as controller:
        controller.wait()
        words = ["tests.serve.scripted_worker", "--controller", controller.url, "--pause", "0.02"]
        with Process("llava.serve.openai_api_server", "--controller", controller.url, env=ENV) as api:
            api.wait()
            workers_alive = [Process(*words, env=ENV).wait() for _ in range(2)]
            stopping, outcomes, in_flight = threading.Event(), [], 0

            def keep_asking(stream):
                with connect(api) as client:
                    while not stopping.is_set():
                        asked = {"model": "scripted", "messages": [{"role": "user", "content": "w " * 20}]}
                        try:
                            reply = client.chat.completions.create(**asked, stream=stream)
                            if stream:
                                with reply:
                                    text = "".join(chunk.choices[0].delta.content for chunk in reply)
                            else:
                                text = reply.choices[0].message.content
                            outcomes.append((stream, text.count("w")))
                        except openai.APIError as error:
                            outcomes.append((stream, error.body["type"]))

            threads = [threading.Thread(target=keep_asking, args=(number % 2 == 0,)) for number in range(8)]
            try:
                wait_until(lambda: len(workers(controller)) == 2, 60)
                for thread in threads:
                    thread.start()
                for _ in range(10):
                    victim = workers_alive.pop(0)
                    wait_until(lambda victim=victim: get_stats(victim)["running"] >= 1, 60)
                    in_flight += get_stats(victim)["running"] + 1  # one may come between the look and the kill
                    victim.kill()
                    workers_alive.append(Process(*words, env=ENV).wait())
                    new = workers_alive[-1].url
                    wait_until(lambda new=new: new in {worker["address"] for worker in workers(controller)}, 60)
            finally:
                stopping.set()
                for thread in threads:
                    thread.join()
                for process in workers_alive:
                    process.kill()
    lost = [outcome for outcome in outcomes if outcome[1] != 20]
    assert len(outcomes) > 20
    assert set(lost) <= {(True, "worker_lost")}
    assert len(lost) <= in_flight


def get_stats(worker):
    headers = {"x-llava-secret": "s3cret"}
    return httpx.post(worker.url + "/worker_get_status", headers=headers).json()["stats"]


def workers(controller):
    return httpx.post(controller.url + "/list_workers", headers={"x-llava-secret": "s3cret"}).json()["workers"]
