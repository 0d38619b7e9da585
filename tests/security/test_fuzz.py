"""Requests made from the servers' descriptions find nothing, and do find what is wrong with a careless server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from llava.serve.api.keys import Keys
from llava.serve.client import ServingClient
from llava.serve.controller import build_app as controller_app
from llava.serve.description import OPERATIONS, document
from llava.serve.openai_api_server import build_app as api_app
from llava.serve.registry import Registry
from llava.serve.worker.app import WorkerApp
from tests.security.fuzz import Findings, fuzz, look_at_logs
from tests.serve.scripted_worker import ScriptedBackend

CASES = 60  # of each server; make fuzz-api asks 10,000


@pytest.mark.parametrize("name", ["controller", "worker", "api"])
def test_nothing_is_found(name, stack):
    findings = Findings()
    fuzz(name, stack[name].url, CASES, findings, headers=stack.credentials(name))
    look_at_logs([stack[name].log], findings)
    assert findings.found == {}
    assert findings.cases >= CASES / 2 and {200, 400} <= findings.statuses.keys()


class Careless(BaseHTTPRequestHandler):
    """Believes what it is sent, as the reference's controller does, and has no form for errors."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            model = json.loads(content)["model"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            return self.send_error(500, type(error).__name__)
        answer = json.dumps({"address": {model: 1} if model else None}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_):
        pass


def test_a_careless_server_is_found(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    findings = Findings()
    fuzz("controller", f"http://127.0.0.1:{server.server_address[1]}", 60, findings, paths=["/get_worker_address"])
    server.shutdown()
    server.server_close()
    found = " ".join(findings.found)
    assert "500 without a type" in found and "not as described" in found
    (tmp_path / "log").write_text("Traceback (most recent call last):\n")
    look_at_logs([tmp_path / "log"], findings)
    assert "traceback in the log of log" in findings.found


def routes_of(app) -> set[tuple[str, str]]:
    """(method, path) of all routes behind the middleware."""
    return {
        (method.lower(), route.path.replace(":path}", "}"))
        for route in app.app.routes
        for method in getattr(route, "methods", None) or ["POST" if "worker" in route.path else "GET"]
        if method != "HEAD"
    }


@pytest.mark.parametrize("name", ["controller", "worker", "api"])
def test_the_description_has_every_route(name):
    apps = {
        "controller": lambda: controller_app(Registry("shortest_queue"), None),
        "worker": lambda: WorkerApp(ScriptedBackend(0), ["m"], None).asgi,
        "api": lambda: api_app(ServingClient("http://localhost:1", None), Keys([])),
    }
    described = {(operation.method, operation.path) for operation in OPERATIONS[name]}
    assert described == routes_of(apps[name]())


def test_the_api_serves_its_description_behind_the_key(stack, capsys):
    from llava.serve.openai_api_server import main

    url = stack["api"].url + "/openapi.json"
    assert httpx.get(url).status_code == 401
    served = httpx.get(url, headers=stack.credentials("api")).json()
    assert served == json.loads(json.dumps(document("api")))
    main(["--openapi"])
    assert json.loads(capsys.readouterr().out) == served


@pytest.mark.parametrize("name", ["controller", "worker", "api"])
def test_unknown_paths_and_methods_have_their_type(name, stack):
    with httpx.Client(base_url=stack[name].url, headers=stack.credentials(name)) as client:
        error = client.get("/nothing/here")
        assert (error.status_code, error.json()["error"]["type"]) == (404, "no_such_route")
        path = next(operation.path for operation in OPERATIONS[name] if operation.body)
        error = client.get(path)
        assert (error.status_code, error.json()["error"]["type"]) == (405, "method_not_allowed")
        assert error.headers["allow"] == "POST"
