"""A worker of another make: plain HTTP, the old protocol, no model. It can stop in the middle of an answer."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeWorker:
    """Runs in a thread; `requests` holds (path, headers, body) of what it was asked. `on_status` is called
    before a status is told. With `refusal` (HTTP's status, JSON) it answers nothing else to a question."""

    def __init__(
        self, models=("m",), speed=1, queue_length=0, words=("a", "b", "c"), break_after=None, delay=0.0, refusal=None
    ):
        self.on_status = lambda: None
        self.status = {"model_names": list(models), "speed": speed, "queue_length": queue_length}
        self.words, self.break_after, self.delay = words, break_after, delay
        self.requests: list[tuple[str, dict, bytes]] = []
        worker = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                self.close_connection = True  # or the thread would go on answering after the worker's end
                worker.requests.append((self.path, dict(self.headers), body))
                if self.path == "/worker_get_status":
                    worker.on_status()
                if self.path == "/worker_get_status" or refusal:
                    code, said = (200, worker.status) if self.path == "/worker_get_status" else refusal
                    content = json.dumps(said).encode()
                    self.send_response(code)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                    return
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for number, word in enumerate(worker.words):
                    if number == worker.break_after:
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    chunk = json.dumps({"text": word, "error_code": 0}).encode() + b"\0"
                    self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                    self.wfile.flush()
                    time.sleep(worker.delay)
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
