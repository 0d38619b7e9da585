"""A server that makes the mistakes that ours must not make: what an attack has to succeed against, to be known for one.

    python -m tests.security.standins --port N [--limits JSON]

Plain uvicorn, an application without a middleware: it answers to any name and any page, reads bodies of any length,
logs what it is told, runs on for clients that have left. With --limits the same application stands behind our
server's connections, with those limits: for tests that need short times or few connections.
"""

import argparse
import asyncio
import json
import logging
import urllib.request
from pathlib import Path


class OpenApp:
    """`/health`; `/stream` (a word every 20 ms, 250 of them); `/large` (30 MB); `/page` (HTML that shows the image
    named in the query); `/fetch` (what the addresses and paths anywhere in the body hold);
    everything else answers with the body's length. `running` is told at `/running`."""

    def __init__(self):
        self.running = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parts, message = [], {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message["body"])
        if model := headers.get("x-model"):
            logging.warning("model %s asked for", model.encode("latin-1").decode("unicode_escape"))
        kind, content = (
            "application/json",
            {"status": "ok", "body": sum(map(len, parts)), "host": headers.get("host", "")},
        )
        if scope["path"] == "/running":
            content = {"running": self.running}
        if scope["path"] == "/fetch":
            content = {"found": await asyncio.to_thread(fetch_all, json.loads(b"".join(parts)))}
        if scope["path"] == "/large":
            content = {"large": "x" * 30_000_000}
        if scope["path"] == "/stream":
            return await self._stream(receive, send)
        answer = json.dumps(content).encode()
        if scope["path"] == "/page":
            kind, answer = "text/html", b"<p>An answer</p><img src='" + scope["query_string"] + b"'>"
        sent = [(b"content-type", kind.encode()), (b"content-length", str(len(answer)).encode())]
        if origin := headers.get("origin"):
            sent += [(b"access-control-allow-origin", origin.encode()), (b"access-control-allow-credentials", b"true")]
        await send({"type": "http.response.start", "status": 200, "headers": sent})
        await send({"type": "http.response.body", "body": answer})

    async def _stream(self, receive, send):
        self.running += 1
        leaving = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(250):
            await asyncio.sleep(0.02)
            if leaving.done():
                return  # and its place stays taken
            await send({"type": "http.response.body", "body": b"word ", "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        self.running -= 1


def fetch_all(value) -> list[str]:
    """What stands at the addresses, and in the files, that a value names anywhere: LLaVA's and FastChat's way."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [found for each in value for found in fetch_all(each)]
    if not isinstance(value, str):
        return []
    if value.startswith("/") and Path(value).is_file():
        return [Path(value).read_text()]
    if value.startswith(("http:", "file:")):
        return [urllib.request.urlopen(value).read().decode()]
    return []


def main() -> None:
    import uvicorn

    from llava.serve.http_protocol import ConnectionLimits
    from llava.serve.http_server import run_server

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--limits", type=json.loads)
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(message)s")
    if args.limits is None:
        uvicorn.run(OpenApp(), port=args.port, http="httptools", log_level="error")
    else:
        run_server(OpenApp(), "127.0.0.1", args.port, limits=ConnectionLimits(**args.limits))


if __name__ == "__main__":
    main()
