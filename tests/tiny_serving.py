"""A tiny model of random weights, served by real processes."""

import httpx
import pytest

from tests.serve.processes import TINY_ENV, Process, wait_until
from tests.tiny import make_llava


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_serving(checkpoint):
    """(controller, worker, API) of the model `tiny`, without keys."""
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    with Process("llava.serve.controller", env=TINY_ENV) as controller:
        controller.wait()
        words = ["--model-path", str(checkpoint), "--model-name", "tiny", "--device", "cpu", "--max-queue", "8"]
        with (
            Process("llava.serve.model_worker", "--controller", controller.url, *words, env=TINY_ENV) as worker,
            Process("llava.serve.openai_api_server", "--controller", controller.url, env=TINY_ENV) as api,
        ):
            worker.wait(seconds=500)
            api.wait()
            wait_until(lambda: httpx.get(api.url + "/ready").status_code == 200, 30)
            yield controller, worker, api


@pytest.fixture
def tiny_client(tiny_serving):
    """OpenAI's client of that API."""
    openai = pytest.importorskip("openai", reason="the extra openai is not installed")
    with openai.OpenAI(base_url=tiny_serving[2].url + "/v1", api_key="none", max_retries=0) as client:
        yield client
