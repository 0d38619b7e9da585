"""Controller, talking worker (tests.security.talking_worker) and API, for as long as a block lasts."""

import contextlib

import httpx

from tests.security.conftest import SECRET
from tests.serve.processes import Process, wait_until

ENV = {"LLAVA_SERVE_SECRET": SECRET}


@contextlib.contextmanager
def serving(*words):
    """`words` go to all three; gives them by name."""
    with Process("llava.serve.controller", *words, env=ENV) as controller:
        controller.wait()
        words = ("--controller", controller.url, *words)
        with (
            Process("tests.security.talking_worker", *words, env=ENV) as worker,
            Process("llava.serve.openai_api_server", *words, env=ENV) as api,
        ):
            worker.wait()
            api.wait()
            wait_until(lambda: httpx.get(api.url + "/ready").status_code == 200, 60)
            yield {"controller": controller, "worker": worker, "api": api}
