"""What stands between the web page's visitors and gradio: a list of allowed routes, uploads, and checked requests.

gradio has some sixty routes, of which the page needs a dozen; no other is reached, and no query that its
own scripts don't send. Uploads are received and shown here, so that a file belongs to the visitor who sent it (a
cookie says who that is) and to nobody else. Plain ASGI; the size of a body is capped before it comes here.
"""

import asyncio
import contextlib
import errno
import json
import logging
import mimetypes
import re
import secrets
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlencode

from llava.errors import LlavaError
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.web.calls import MAX_FILES, NOT_YOURS, SESSION, checked_call, checked_cancel
from llava.serve.web.memory_budget import DrawnViews
from llava.serve.web.sessions import Sessions
from llava.serve.web.uploads import BLOCK_BYTES, Refusal, Upload, Uploads

logger = logging.getLogger(__name__)

API = "/gradio_api"
FILE = f"{API}/file="
PAGES = {"/health", "/theme.css", "/favicon.ico", "/robots.txt", f"{API}/app_id"}
ASSET = re.compile(r"/(assets|static)(/[\w@+-][\w@+.-]*)+", re.ASCII)  # no segment begins with a dot
HEARTBEAT = re.compile(rf"{API}/heartbeat/([A-Za-z0-9_-]{{1,64}})", re.ASCII)
SLICE = re.compile(r"/slice/([A-Za-z0-9_-]{32})", re.ASCII)
PLACE = re.compile(r"[0-9]{1,6}", re.ASCII)
CANCEL = f"{API}/cancel"
QUEUED, DIRECT = f"{API}/queue/join", f"{API}/run/predict"
CALLS = {QUEUED, DIRECT, CANCEL}

MAX_CALL_BYTES = 1 << 20
MAX_CONTENT_TYPE = 256
MAX_NAME = 100
UPLOAD_SECONDS = 600
PROGRESS_SECONDS = 0.2
COOKIE = "llava_visitor"
VISITOR = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
SHOWN_INLINE = {"image/png", "image/jpeg", "image/gif", "image/webp"}
PRIVATE = {
    "cache-control": "no-store",
    "content-security-policy": "sandbox; default-src 'none'",
    "x-content-type-options": "nosniff",
}
"""Of what a visitor has sent: no browser keeps it on a disk, or takes it for a page."""
UNSAFE_NAME = re.compile(r"[^\w .()+-]")


class PageMiddleware:
    """ASGI middleware.

    Args:
        app: gradio's application.
        handlers: how many values each handler takes, by its number, for those that go through gradio's queue (QUEUED)
            and those that don't (DIRECT); a queued one called directly would pass by the cap on answers at a time.
        uploads: the record of uploads, below the folder that gradio takes for its own.
        drawn: the scans of all visitors, and what their slices look like.
        sessions: gradio's sessions.
        key_of: from a request's headers the name of the visitor's API key.
        max_file: bytes of one uploaded file.
        embed: whether the page stands in another site's page: the cookie then has to be sent there too.
    """

    def __init__(
        self,
        app,
        handlers: dict[str, dict[int, int]],
        uploads: Uploads,
        drawn: DrawnViews,
        sessions: Sessions,
        key_of: Callable[[dict[str, str]], str],
        max_file: int,
        embed: bool = False,
    ):
        self.app, self.handlers, self.uploads, self.drawn = app, handlers, uploads, drawn
        self.sessions, self.key_of = sessions, key_of
        self.max_file, self.embed = max_file, embed

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        started = False

        async def noting_send(message):
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._serve(scope, receive, noting_send)
        except (Refusal, ServeError) as error:
            if started or getattr(error, "error_type", None) is ErrorType.CANCELLED:
                raise
            await _refuse(scope, receive, send, error.status, str(error))

    async def _serve(self, scope, receive, send) -> None:
        method, path = scope["method"], scope["path"]
        reads = method in ("GET", "HEAD")
        visitor = visitor_of(scope)
        if reads and path == "/":
            await self.app(_without_query(scope), receive, self._with_cookie(scope, send, visitor))
        elif reads and (path in PAGES or ASSET.fullmatch(path)):
            await self.app(_without_query(scope), receive, send)
        elif reads and (heartbeat := HEARTBEAT.fullmatch(path)):
            self._require_own(scope, heartbeat[1])
            await self.app(_without_query(scope), receive, send)
        elif reads and path == f"{API}/queue/data":
            session = _query(scope, "session_hash")
            self._require_own(scope, session)
            query = urlencode({"session_hash": session}).encode()
            with self.sessions.unread.being_read(session):
                await self.app({**scope, "query_string": query}, receive, send)
        elif reads and path == f"{API}/upload_progress":
            await self._show_progress(scope, receive, send, visitor)
        elif reads and path.startswith(FILE):
            await self._show_file(scope, receive, send, visitor)
        elif reads and (slice := SLICE.fullmatch(path)):
            await self._show_slice(scope, receive, send, visitor, slice[1])
        elif method == "POST" and path == f"{API}/upload":
            await self._take_files(scope, receive, send, visitor)
        elif method == "POST" and path in CALLS:
            await self._call(scope, receive, send, visitor)
        else:
            raise Refusal(404, "There is no such page.")

    def _require_own(self, scope, session: str) -> None:
        if not self.sessions.belongs(session, _cookie(scope)):
            raise Refusal(403, "This conversation isn't yours, or your cookie is no longer kept. Load the page anew.")

    async def _call(self, scope, receive, send, visitor: str) -> None:
        """A handler's call: gradio gets the body that was checked, never the one that came."""
        body = await _read_body(receive)
        if scope["path"] == CANCEL:
            session, body = checked_cancel(body)
        else:
            handlers = self.handlers[scope["path"]]
            session, body = checked_call(body, handlers, lambda path: self.uploads.use(path, visitor))
        self._require_own(scope, session)
        if scope["path"] == QUEUED and self.sessions.is_busy(session):
            raise Refusal(429, "Too much of this page waits to be read or done. Wait for it, then try again.")
        if scope["path"] == QUEUED and not self.sessions.has_space(len(body)):
            raise Refusal(503, "The server has too much to do just now. Try again in a few minutes.")
        headers = [each for each in scope["headers"] if each[0] not in (b"content-type", b"content-length")]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        sent = False

        async def receive_checked():
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app({**_without_query(scope), "headers": headers}, receive_checked, send)

    async def _take_files(self, scope, receive, send, visitor: str) -> None:
        """Files of a form, kept below the visitor's name; the answer is the list of their paths."""
        from gradio.route_utils import GradioMultiPartParser, MultiPartException
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        request = Request(scope, receive)
        kind = request.headers.get("content-type", "")
        if not kind.startswith("multipart/form-data") or len(kind) > MAX_CONTENT_TYPE:
            raise Refusal(400, "Files come as a form (multipart/form-data).")
        upload_id = _query(scope, "upload_id", default="")
        send = self._with_cookie(scope, send, visitor)
        uploads = self.uploads

        class CountedFiles(GradioMultiPartParser):
            def on_part_begin(self) -> None:
                uploads.grow(upload, BLOCK_BYTES, 1)
                super().on_part_begin()

            async def parse(self) -> Any:
                try:
                    return await super().parse()
                except OSError:
                    for each in self._files_to_close_on_error:  # else each fails once more when it is forgotten
                        with contextlib.suppress(OSError):
                            each.close()
                    raise

        try:
            with uploads.arriving(visitor, upload_id, self.key_of(dict(request.headers))) as upload:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    parser = CountedFiles(
                        request.headers,
                        self._counted(request, upload),
                        max_files=MAX_FILES,
                        max_fields=0,
                        upload_dir=upload.folder,
                        upload_id=upload_id,
                        upload_progress=cast(Any, upload),  # it has the two methods that the parser calls
                        max_file_size=self.max_file,
                    )
                    form = await parser.parse()
                _put_in_place(upload, form.getlist("files"))
                paths = list(upload.paths)
        except MultiPartException as error:
            if "File size" in error.message:
                raise Refusal(413, f"A file is larger than {self.max_file >> 20} MiB.") from None
            raise Refusal(400, "The form with the files can't be read.") from None
        except TimeoutError:
            raise Refusal(408, "The files took too long to arrive.") from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            logger.warning("the folder of uploads is full")
            raise Refusal(507, "The server has no space for files just now. Try again in a few minutes.") from None
        await JSONResponse(paths)(scope, receive, send)

    async def _counted(self, request, upload: Upload) -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            self.uploads.grow(upload, len(chunk))
            yield chunk

    async def _show_progress(self, scope, receive, send, visitor: str) -> None:
        """Server-sent events with the bytes that have arrived, as gradio's page reads them."""
        from starlette.responses import StreamingResponse

        upload_id = _query(scope, "upload_id")

        async def events():
            told: dict[str, int] = {}
            waited = 0.0
            while waited < UPLOAD_SECONDS:
                upload = self.uploads.find(visitor, upload_id)
                # Nothing of that name: it has not begun, or it was refused.
                if (upload is None and (told or waited > 3)) or (upload is not None and upload.is_whole):
                    break
                for name, size in list(upload.progress.items()) if upload else ():
                    if size > told.get(name, 0):
                        event = {"msg": "update", "orig_name": name, "chunk_size": size - told.get(name, 0)}
                        told[name] = size
                        yield f"data: {json.dumps(event)}\n\n"
                await asyncio.sleep(PROGRESS_SECONDS)
                waited += PROGRESS_SECONDS
            yield f"data: {json.dumps({'msg': 'done'})}\n\n"

        await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)

    async def _show_file(self, scope, receive, send, visitor: str) -> None:
        """An upload, to the visitor who has sent it; whatever it is, the browser runs nothing of it."""
        from starlette.responses import FileResponse

        path = scope["path"].removeprefix(FILE)
        if not self.uploads.belongs(path, visitor):
            raise Refusal(403, NOT_YOURS)
        kind = mimetypes.guess_type(path)[0]
        inline = kind in SHOWN_INLINE
        headers = PRIVATE | {"content-disposition": "inline" if inline else "attachment"}
        kind = kind if inline else "application/octet-stream"
        await FileResponse(path, media_type=kind, headers=headers)(scope, receive, send)

    async def _show_slice(self, scope, receive, send, visitor: str, name: str) -> None:
        """A slice of a scan as it is to look now, to the visitor who has sent the scan."""
        from starlette.responses import Response

        scan = self.drawn.find(name, visitor)
        if scan is None:
            raise Refusal(403, "The scan isn't yours, or is no longer kept. Add it again.")
        place = _query(scope, "place")
        if not PLACE.fullmatch(place):
            raise Refusal(400, "The address has no valid place.")
        try:
            view = await self.drawn.draw(scan, int(place))
        except LlavaError as error:
            raise Refusal(404, str(error)) from error
        await Response(view.png, media_type="image/png", headers=PRIVATE)(scope, receive, send)

    def _with_cookie(self, scope, send, visitor: str):
        """`send` that gives a visitor without a cookie one, which the browser keeps until it is closed."""
        if _cookie(scope) == visitor:
            return send
        site = "Lax"
        if scope.get("scheme") == "https":
            site = "None; Partitioned; Secure" if self.embed else "Lax; Secure"
        line = f"{COOKIE}={visitor}; Path=/; HttpOnly; SameSite={site}"

        async def send_with_cookie(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"set-cookie", line.encode())]
            await send(message)

        return send_with_cookie


def _put_in_place(upload: Upload, files: list) -> None:
    """Name the files as they were called, each in a folder of its own; what is no whole file of the form goes."""
    for number, file in enumerate(files):
        if isinstance(file, str):
            continue
        file.file.close()
        place = upload.folder / str(number)
        place.mkdir(mode=0o700)
        path = Path(file.file.name).rename(place / _safe_name(file.filename or ""))
        upload.paths.append(str(path))
    for left in upload.folder.iterdir():
        if left.is_file():
            left.unlink()
    if not upload.paths:
        raise Refusal(400, "The form has no file.")


def _safe_name(name: str) -> str:
    """A visitor's name of a file without what a path or an address could mean by it; its suffixes stay."""
    name = UNSAFE_NAME.sub("_", re.split(r"[/\\]", name[-MAX_NAME:])[-1]).strip(" .")
    while len(name.encode(errors="replace")) > MAX_NAME:
        name = name[1:]
    return name.strip(" .") or "file"


def visitor_of(scope) -> str:
    """The visitor's id from the cookie; a new one if there is no cookie."""
    return _cookie(scope) or secrets.token_urlsafe(32)


def _cookie(scope) -> str | None:
    from starlette.requests import cookie_parser  # unlike the standard one it accepts other programs' odd cookies

    for name, value in scope["headers"]:
        visitor = cookie_parser(value.decode("latin-1")).get(COOKIE, "") if name == b"cookie" else ""
        if VISITOR.fullmatch(visitor):
            return visitor
    return None


def _query(scope, name: str, default: str | None = None) -> str:
    """One value of the address's query, which is a short name."""
    value = parse_qs(scope["query_string"].decode("latin-1")).get(name, [default])[0]
    if value is None or not (value == default or SESSION.fullmatch(value)):
        raise Refusal(400, f"The address has no valid {name}.")
    return value


def _without_query(scope) -> dict:
    return {**scope, "query_string": b""}


async def _read_body(receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > MAX_CALL_BYTES:
            raise Refusal(413, f"The request is larger than {MAX_CALL_BYTES >> 20} MiB.")
    return b"".join(parts)


async def _refuse(scope, receive, send, status: int, line: str) -> None:
    """One plain line; as JSON where the page's script looks for `detail` or `error`."""
    from starlette.responses import JSONResponse, PlainTextResponse, Response

    response: Response
    if scope["path"] in CALLS:
        response = JSONResponse({"detail": line, "error": line}, status)
    else:
        response = PlainTextResponse(line + "\n", status)
    await response(scope, receive, send)
