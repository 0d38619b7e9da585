"""A tiny model of random weights, served by real processes."""

from contextlib import contextmanager

import httpx
import pytest

from tests.serve.processes import TINY_ENV, Process, wait_until
from tests.tiny import make_llava


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("tiny"))


@contextmanager
def serving(checkpoint, name):
    """OpenAI's client of a controller, a worker with this model and the API, without keys."""
    with _processes(checkpoint, name) as (_, _, api), _client(api) as client:
        yield client


@contextmanager
def _processes(checkpoint, name):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    with Process("llava.serve.controller", env=TINY_ENV) as controller:
        controller.wait()
        words = ["--model-path", str(checkpoint), "--model-name", name, "--device", "cpu", "--max-queue", "8"]
        with (
            Process("llava.serve.model_worker", "--controller", controller.url, *words, env=TINY_ENV) as worker,
            Process("llava.serve.openai_api_server", "--controller", controller.url, env=TINY_ENV) as api,
        ):
            worker.wait(seconds=500)
            api.wait()
            wait_until(lambda: httpx.get(api.url + "/ready").status_code == 200, 30)
            yield controller, worker, api


def _client(api):
    openai = pytest.importorskip("openai", reason="the extra openai is not installed")
    return openai.OpenAI(base_url=api.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tiny_serving(checkpoint):
    """(controller, worker, API) of the model `tiny`, without keys."""
    with _processes(checkpoint, "tiny") as processes:
        yield processes


@pytest.fixture
def tiny_client(tiny_serving):
    """OpenAI's client of that API."""
    with _client(tiny_serving[2]) as client:
        yield client
