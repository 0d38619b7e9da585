"""How close many connections come to what a slow server allows: 2,000 small articles with 50 ms of latency.

    python benchmarks/download.py [--json figures.json]

The ideal is articles x latency / connections. The server answers each request 50 ms after it arrived and runs in a
process of its own; the sequential run fetches a part of the same articles over one connection.
"""

import asyncio
import io
import json
import logging
import multiprocessing
import os
import resource
import tarfile
import tempfile
import time
from pathlib import Path

from checkout import add_json_flag, show

from llava.commandline import ArgumentParser, run
from llava.data.fetching.articles import read_plan
from llava.data.fetching.journal import Journal
from llava.data.fetching.settings import Limits, Settings
from llava.data.fetching.workers import download

IMAGE_BYTES = 6_000


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--articles", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--sequential-articles", type=int, default=100, help="fetched over one connection")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--folder", help="where images are written; default: the system's folder of temporary files")
    add_json_flag(parser)
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    logging.getLogger("llava").setLevel(logging.WARNING)
    content = os.urandom(IMAGE_BYTES)
    port_is = multiprocessing.get_context("spawn").Queue()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(archive(content), args.latency, port_is), daemon=True
    )
    server.start()
    try:
        address = f"http://127.0.0.1:{port_is.get(timeout=60)}"
        # Nothing is deleted before the last round: a disk goes on with that while the next one is measured.
        with tempfile.TemporaryDirectory(dir=args.folder) as where:
            rounds = [fetch(address, args.articles, args.connections, content, where) for _ in range(args.rounds)]
            sequential, _ = fetch(address, args.sequential_articles, 1, content, where)
        seconds, cpu = sorted(rounds)[len(rounds) // 2]
    finally:
        server.terminate()
        server.join()
    ideal = args.articles * args.latency / args.connections
    figures = {
        "articles_per_second": args.articles / seconds,
        "seconds": seconds,
        "ideal_seconds": ideal,
        "share_of_ideal": ideal / seconds,
        "over_sequential_ratio": (args.articles / seconds) / (args.sequential_articles / sequential),
        "cpu_ms_per_article": 1000 * cpu / args.articles,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    title = f"{args.articles} articles, {args.connections} connections, {args.latency * 1000:.0f} ms latency"
    print("seconds of all rounds: " + ", ".join(f"{taken:.3f}" for taken, _ in rounds))
    show(title, figures, args.json)
    return 0


def fetch(address: str, articles: int, connections: int, content: bytes, where: str) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of a download into a new folder in `where`; every image is checked."""
    folder = Path(tempfile.mkdtemp(dir=where))
    rows = (
        {"pair_id": f"p{n}", "pmc_tar_url": f"{address}/PMC{n}.tar.gz", "image_file_path": "PMC/x.jpg"}
        for n in range(articles)
    )
    (folder / "urls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = read_plan(folder / "urls.jsonl")
    journal = Journal(folder / "images", folder / "failures.jsonl")
    settings = Settings(connections, Limits(requests_per_second=0), oa_service=None)
    wall, cpu = time.perf_counter(), time.process_time()
    download(plan.articles, journal, settings)
    taken = time.perf_counter() - wall, time.process_time() - cpu
    journal.close()
    saved = list((folder / "images").iterdir())
    if len(saved) != articles or any(path.read_bytes() != content for path in saved):
        raise SystemExit("images are missing or differ: the figures would mean nothing")
    return taken


def archive(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in (("PMC/x.nxml", b"some text " * 300), ("PMC/x.jpg", content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def serve(body: bytes, latency: float, port_is) -> None:
    """Answer every request with `body`, `latency` seconds after it came."""
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    class Connection(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport, self.head = transport, b""

        def data_received(self, data):
            self.head += data
            if self.head.endswith(b"\r\n\r\n"):
                self.head = b""
                asyncio.get_running_loop().call_later(latency, self.transport.write, reply)

    async def main():
        server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=512)
        port_is.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


if __name__ == "__main__":
    run(main)
