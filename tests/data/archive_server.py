"""A real HTTP server of article archives, good and bad, for the tests of the downloader."""

import asyncio
import gzip
import io
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class Reply:
    """What a path answers. `length` overrides the true Content-Length; `cut_after` bytes the line is cut;
    `stall_after` bytes it falls silent; `drip` waits so many seconds between pieces of 64 bytes, `drip_headers` between
    bytes of the headers."""

    body: bytes | Iterable[bytes] = b""
    status: int = 200
    length: int | None = None
    cut_after: int | None = None
    stall_after: int | None = None
    drip: float = 0.0
    drip_headers: float = 0.0
    delay: float = 0.0
    headers: dict = field(default_factory=dict)


class ArchiveServer:
    """Serves `pages` (path → Reply, or a list of them for one request after the other) on a port of its own."""

    def __init__(self):
        self.pages: dict[str, Reply | list[Reply]] = {}
        self.requests: Counter = Counter()
        self.most_at_once = 0
        self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ArchiveServer":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        server.close()

    async def _serve(self, reader, writer) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                self.requests[path] += 1
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                try:
                    if not await self._answer(writer, self._reply(path)):
                        return
                finally:
                    self._at_once -= 1
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    def _reply(self, path: str) -> Reply:
        reply = self.pages.get(path, Reply(b"gone", 404))
        if isinstance(reply, list):
            return reply[min(self.requests[path], len(reply)) - 1]
        return reply

    async def _answer(self, writer, reply: Reply) -> bool:
        """Whether the connection stays open."""
        await asyncio.sleep(reply.delay)
        body = [reply.body] if isinstance(reply.body, bytes) else reply.body
        length = len(reply.body) if isinstance(reply.body, bytes) else None
        length = reply.length if reply.length is not None else length
        headers = {**reply.headers, **({"Content-Length": length} if length is not None else {"Connection": "close"})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        for byte in f"HTTP/1.1 {reply.status} X\r\n{lines}".encode() if reply.drip_headers else b"":
            writer.write(bytes([byte]))
            await asyncio.sleep(reply.drip_headers)
        writer.write(b"\r\n" if reply.drip_headers else f"HTTP/1.1 {reply.status} X\r\n{lines}\r\n".encode())
        sent = 0
        for piece in body:
            size = 64 if reply.drip else 1 << 16
            for start in range(0, len(piece), size):
                part = piece[start : start + size]
                for limit in (reply.cut_after, reply.stall_after):
                    if limit is not None and sent + len(part) > limit:
                        writer.write(part[: limit - sent])
                        await writer.drain()
                        if reply.stall_after is not None:
                            await asyncio.sleep(3600)
                        return False
                writer.write(part)
                await writer.drain()
                sent += len(part)
                if reply.drip:
                    await asyncio.sleep(reply.drip)
        return length is not None and length == sent


def archive(*members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar.gz of (name, content) and of bare headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=format, compresslevel=1) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def header(name: str, kind: bytes, linkname: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, linkname, size
    return info


def archive_with_bomb(
    name: str, size: int, *behind: tuple[str, bytes], format: int = tarfile.PAX_FORMAT
) -> Iterator[bytes]:
    """A tar.gz that begins with a member of `size` zero bytes, a thousandth of it when packed, made as it is sent.

    It is a row of gzip streams, as the format allows, so the zeros are packed once. Such a size is told in an extended
    header (PAX_FORMAT) or in binary (GNU_FORMAT).
    """
    yield gzip.compress(header(name, tarfile.REGTYPE, size=size).tobuf(format))
    piece = 1 << 24
    whole, rest = divmod(size + -size % tarfile.BLOCKSIZE, piece)
    zeros = gzip.compress(bytes(piece))
    for _ in range(whole):
        yield zeros
    yield gzip.compress(bytes(rest))
    last = io.BytesIO()
    with tarfile.open(fileobj=last, mode="w") as tar:
        for member, content in behind:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    yield gzip.compress(last.getvalue())
