"""A real HTTP server on loopback that speaks the OpenAI protocol, with faults on demand.

Run as a process (`OpenAIServer` does it) so that the client under test has its core to itself. The last user
message of a request is the item's identity: the server counts requests and answers per item, and `GET /stats`
tells them. Written on asyncio streams because a framework won't send a cut or malformed reply.
"""

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import time
import urllib.request
from email.utils import formatdate
from pathlib import Path

FAULTS = ("429", "500", "timeout", "cut", "malformed", "empty")


class OpenAIServer:
    """Start the server as a process; `url` is its base address, `stats()` what it counted."""

    def __init__(self, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *arguments], stdout=subprocess.PIPE, text=True
        )
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats") as reply:
            return json.load(reply)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Server:
    def __init__(self, args):
        self.args = args
        self.requests: dict[str, int] = {}
        self.answered: dict[str, int] = {}
        self.faulted: dict[str, int] = {}
        self.in_flight = self.peak = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}

    async def handle(self, reader, writer):
        try:
            while request := await self.read(reader):
                await self.respond(*request, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def read(self, reader):
        line = await reader.readline()
        if not line:
            return None
        method, path, _ = line.decode().split(" ", 2)
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return method, path, headers, body

    async def respond(self, method, path, headers, body, writer):
        if path == "/stats":
            names = ("requests", "answered", "faulted", "in_flight", "peak")
            return self.send(writer, 200, {name: getattr(self, name) for name in names})
        key = headers.get("authorization", "").removeprefix("Bearer ") or headers.get("api-key", "")
        if self.args.key and key != self.args.key:
            return self.send(writer, 401, {"error": {"message": "wrong key", "code": "invalid_api_key"}})
        if path.split("?")[0].endswith("/chat/completions"):
            return await self.chat(json.loads(body), writer)
        if "/files" in path or "/batches" in path:
            return self.batch_api(method, path, headers, body, writer)
        return self.send(writer, 404, {"error": {"message": f"no {path}"}})

    async def chat(self, request, writer):
        item = text_of(request["messages"][-1]["content"])
        self.requests[item] = self.requests.get(item, 0) + 1
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            fault = self.fault(item)
            if fault:
                self.faulted[item] = self.faulted.get(item, 0) + 1
                return await self.fail(fault, writer)
            await asyncio.sleep(self.args.delay)
            status, reply = self.completion(request)
            if status == 200:
                self.answered[item] = self.answered.get(item, 0) + 1
            return self.send(writer, status, reply)
        finally:
            self.in_flight -= 1

    def fault(self, item):
        """The first request of a share of the items fails; which and how depends on the item alone."""
        number = int.from_bytes(hashlib.sha256(item.encode()).digest()[:4], "big") / 2**32
        if number >= self.args.faults or self.requests[item] > self.args.faults_per_item:
            return None
        return self.args.kinds[int(number * 1e6) % len(self.args.kinds)]

    async def fail(self, fault, writer):
        if fault == "429":
            return self.send(writer, 429, {"error": {"message": "slow down"}}, "Retry-After: 0.05\r\n")
        if fault == "date":
            now = time.time()
            dates = f"Date: {formatdate(now, usegmt=True)}\r\nRetry-After: {formatdate(now + 1, usegmt=True)}\r\n"
            return self.send(writer, 429, {"error": {"message": "slow down"}}, dates)
        if fault == "500":
            return self.send(writer, 500, {"error": {"message": "oops"}})
        if fault == "timeout":
            await asyncio.sleep(self.args.hang)
            raise ConnectionError
        if fault == "malformed":
            return self.send_raw(writer, 200, b'{"choices": [{"mess')
        if fault == "empty":
            return self.send(writer, 200, completion("", "stop"))
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"id":')
        await writer.drain()
        raise ConnectionError

    def completion(self, request):
        item = text_of(request["messages"][-1]["content"])
        if "FORBIDDEN" in item:
            return 400, {"error": {"message": "content refused", "code": "content_filter"}}
        if "INVALID" in item:
            return 400, {"error": {"message": "bad parameter", "code": "invalid_value"}}
        wrong = [name for name in ("max_tokens", "temperature") if name in request]
        if self.args.mode == "reasoning" and wrong:
            words = f"Unsupported parameter: '{wrong[0]}' is not supported with this model."
            return 400, {"error": {"message": words, "code": "unsupported_parameter", "param": wrong[0]}}
        if "SPENT" in item:
            return 200, completion("", "length")
        return 200, completion(answer_to(request, self.args.mode), "stop", request["model"], prompt_tokens=len(item))

    def batch_api(self, method, path, headers, body, writer):
        parts = path.split("/v1/")[1].split("/")
        if parts == ["files"]:
            boundary = headers["content-type"].split("boundary=")[1].encode()
            content = max((part.partition(b"\r\n\r\n")[2] for part in body.split(b"--" + boundary)), key=len)
            name = f"file-{len(self.files)}"
            self.files[name] = content.rstrip(b"\r\n")
            return self.send(writer, 200, file_object(name, len(content)))
        if parts[0] == "files":
            return self.send_raw(writer, 200, self.files[parts[1]])
        if parts == ["batches"] and method == "POST":
            name = f"batch-{len(self.batches)}"
            lines = [json.loads(line) for line in self.files[json.loads(body)["input_file_id"]].splitlines()]
            output = []
            for line in lines:
                status, reply = self.completion(line["body"])
                output.append({"custom_id": line["custom_id"], "response": {"status_code": status, "body": reply}})
            self.files[f"out-{name}"] = b"\n".join(json.dumps(line, ensure_ascii=False).encode() for line in output)
            self.batches[name] = {"polls": 0, "total": len(lines)}
        else:
            name = parts[1]
            self.batches[name]["polls"] += 1
            if self.batches[name]["polls"] <= self.args.poll_faults:
                return self.send(writer, 503, {"error": {"message": "busy"}})
        done = self.batches[name]["polls"] >= self.args.polls
        return self.send(writer, 200, batch_object(name, "completed" if done else "in_progress", done))

    def send(self, writer, status, content, more=""):
        self.send_raw(writer, status, json.dumps(content).encode(), more)

    def send_raw(self, writer, status, body, more=""):
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)


def text_of(content):
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def answer_to(request, mode):
    item = text_of(request["messages"][-1]["content"])
    if mode.startswith("judge"):
        number = hashlib.sha256(item.encode()).digest()[0]
        if mode == "judge-messy" and number % 4 == 0 and len(request["messages"]) == 2:
            return "Both answers are good, the first one more so.\n8 7"
        return f"{5 + number % 5} {3 + number % 7}\nAssistant 1 says more of what the context supports."
    if mode == "dialogue":
        return (
            "User: What kind of picture is this?\nAssistant: It seems to be a radiological image.\n"
            "User: What stands out?\nAssistant: A region of different density stands out."
        )
    return f"answer to {item[:60]}"


def completion(text, reason, model="m", prompt_tokens=10):
    return {
        "id": "c", "object": "chat.completion", "created": int(time.time()), "model": model,
        "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 5, "total_tokens": prompt_tokens + 5},
    }  # fmt: skip


def file_object(name, size):
    return {"id": name, "object": "file", "bytes": size, "created_at": 0, "filename": "f", "purpose": "batch",
            "status": "processed"}  # fmt: skip


def batch_object(name, status, done):
    return {"id": name, "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": "f",
            "completion_window": "24h", "created_at": 0, "status": status,
            "output_file_id": f"out-{name}" if done else None}  # fmt: skip


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.005)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--faults-per-item", type=int, default=1)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(FAULTS))
    parser.add_argument("--hang", type=float, default=30.0)
    parser.add_argument("--key", default="")
    parser.add_argument("--mode", default="echo")
    parser.add_argument("--polls", type=int, default=2)
    parser.add_argument("--poll-faults", type=int, default=0)
    server = Server(parser.parse_args())
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, limit=2**24)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
