"""A visitor of the web page who writes his own requests, and an address that notes who asks it."""

import http.server
import json
import re
import threading
from contextlib import contextmanager

import httpx

FILE_DATA = {"_type": "gradio.FileData"}
WORDS = b"what only the server's owner may read"
CONFIG = re.compile(r"window\.gradio_config = (.*?);\s*</script>", re.DOTALL)


def file_data(path, **more) -> dict:
    return {"path": str(path), "meta": FILE_DATA, **more}


def question(*files, text="What is shown?") -> dict:
    return {"text": text, "files": list(files)}


class Visitor:
    """One browser: its cookies, and its session with gradio."""

    count = 0

    def __init__(self, url: str, key: str | None = None):
        Visitor.count += 1
        self.session = f"session{Visitor.count}"
        self.client = httpx.Client(base_url=url, timeout=60, auth=("visitor", key) if key else None)
        page = self.client.get("/").text
        self.config = json.loads(CONFIG.search(page).group(1))

    def handler(self, element: str, event: str) -> int:
        """The number of the handler of a component's event."""
        (part,) = [each["id"] for each in self.config["components"] if each["props"].get("elem_id") == element]
        (number,) = [each["id"] for each in self.config["dependencies"] if [part, event] in each["targets"]]
        return number

    def place(self, element: str, event: str) -> tuple[int, dict]:
        """(number, description) of the handler of a component's event."""
        number = self.handler(element, event)
        (found,) = [each for each in self.config["dependencies"] if each["id"] == number]
        return number, found

    def timer(self) -> tuple[int, dict]:
        """The same of the page's clock."""
        (clock,) = [each["id"] for each in self.config["components"] if each["type"] == "timer"]
        (found,) = [each for each in self.config["dependencies"] if [clock, "tick"] in each["targets"]]
        return found["id"], found

    def call(self, number: int, handler: dict, **values) -> list[dict]:
        """The events of a handler's call; `values` by the components' names, else those they begin with."""
        parts = {each["id"]: each for each in self.config["components"]}
        inputs = [parts[each]["props"] for each in handler["inputs"]]
        data = [values.get(props.get("elem_id"), props.get("value")) for props in inputs]
        body = {"data": data, "fn_index": number, "trigger_id": None, "session_hash": self.session}
        reply, events = self.send(body)
        reply.raise_for_status()
        return [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line]

    def upload(self, name="x.png", content=b"x") -> httpx.Response:
        return self.client.post("/gradio_api/upload", files={"files": (name, content, "image/png")})

    def body(self, data, element="other", event="change", **more) -> dict:
        number = self.handler(element, event)
        return {"data": data, "fn_index": number, "trigger_id": None, "session_hash": self.session, **more}

    def send(self, body, route="queue/join") -> tuple[httpx.Response, str]:
        """(what the call was answered with, all events that came of it)."""
        raw = body if isinstance(body, (bytes, str)) else json.dumps(body)
        reply = self.client.post(f"/gradio_api/{route}", content=raw, headers={"content-type": "application/json"})
        if reply.status_code != 200 or route != "queue/join":
            return reply, ""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            return reply, "\n".join(stream.iter_lines())

    def read(self, path: str) -> httpx.Response:
        return self.client.get(f"/gradio_api/file={path}")

    def steal(self, body, name: str) -> tuple[httpx.Response, bytes]:
        """(the answer to a call, what a file of this name that the call's events speak of holds)."""
        reply, events = self.send(body)
        for path in dict.fromkeys(re.findall(rf"/[^\s'\"\\:,]*/{re.escape(name)}", events)):
            shown = self.read(path)
            if shown.status_code == 200:
                return reply, shown.content
        return reply, reply.content + events.encode()


def assert_refused(reply: httpx.Response, *secrets: str) -> None:
    """One plain line that names no file and holds nothing of one."""
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text)
    text = reply.json()["detail"] if "json" in reply.headers["content-type"] else reply.text.removesuffix("\n")
    assert text and "\n" not in text and len(text) < 200
    for each in ("llava-web", "/tmp", "/dev/shm", "Traceback", WORDS.decode(), *secrets):
        assert each not in reply.text
    assert "location" not in reply.headers


@contextmanager
def listener():
    """An address of a neighbour; yields (its URL, the paths it was asked for)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-length", str(len(WORDS)))
            self.end_headers()
            self.wfile.write(WORDS)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
