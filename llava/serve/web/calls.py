"""What the page's scripts may send to gradio: a list of the allowed, everything else is refused.

gradio copies whatever file, or fetches whatever address, an object like {"path": …, "meta": …} names, wherever in a
request it stands. So a request is taken apart and written anew: values are plain, or the one form that the question's
box has, and its files are uploads of the same visitor. Needs no gradio.
"""

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from llava.serve.web.uploads import Refusal

FILE_KEYS = {"path", "url", "orig_name", "size", "mime_type", "is_stream", "meta"}
FILE_META = {"_type": "gradio.FileData"}
MAX_ITEMS = 64  # values of a choice
MAX_FILES = 512  # of a question: a series of slices
MAX_NUMBER = 2**53  # the largest that scripts count exactly
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
# Also values that no component would take for a file or an address: none of the page's own looks like this.
SCHEME_OR_ROOT = r"\s*([a-z][a-z0-9+.-]*:[/\\]|(data|file|blob|javascript):|[/\\~{\[])"
FILE_LIKE = re.compile(SCHEME_OR_ROOT + r"|(.*[/\\])?\.\.([/\\]|$)", re.IGNORECASE | re.DOTALL)
NOT_YOURS = "A file of the request isn't an upload of yours, or is no longer kept. Add it again."


def checked_call(body: bytes, handlers: dict[int, int], belongs: Callable[[str], bool]) -> tuple[str, bytes]:
    """(the session, the body written anew) of a call of one of the page's handlers.

    Args:
        body: JSON as it came.
        handlers: how many values each handler takes that may be called here, by its number.
        belongs: whether a path is an upload of the visitor who asks.

    Raises:
        Refusal: 400 for what the page's own scripts never send, 403 for a file that isn't the visitor's.
    """
    call = _object(body, {"data", "event_data", "fn_index", "trigger_id", "session_hash"})
    number, data = _number(call.get("fn_index"), "fn_index"), call.get("data")
    if number not in handlers:
        raise _bad("fn_index")
    if not isinstance(data, list) or len(data) != handlers[number]:
        raise _bad("data")
    session = _name(call.get("session_hash"), "session_hash")
    return session, _written(
        {
            "data": [_value(each, belongs) for each in data],
            "event_data": _event(call.get("event_data")),
            "fn_index": number,
            "trigger_id": _number(call.get("trigger_id"), "trigger_id"),
            "session_hash": session,
        }
    )


def checked_cancel(body: bytes) -> tuple[str, bytes]:
    """(the session, the body written anew) of what ends a running call; raises a Refusal as `checked_call`."""
    call = _object(body, {"session_hash", "fn_index", "event_id"})
    session = _name(call.get("session_hash"), "session_hash")
    return session, _written(
        {
            "session_hash": session,
            "fn_index": _number(call.get("fn_index"), "fn_index"),
            "event_id": _name(call.get("event_id"), "event_id"),
        }
    )


def _object(body: bytes, keys: set[str]) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Refusal(400, "The request is not JSON.") from None
    if not isinstance(value, dict) or not value.keys() <= keys:
        raise _bad("fields")
    return value


def _written(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _value(value: Any, belongs: Callable[[str], bool]) -> Any:
    """One component's value: plain, or a question with its files."""
    if not isinstance(value, dict):
        return _plain(value, "data")
    files = value.get("files")
    # A value that the server has set comes back with this mark.
    keys = value.keys() - ({"__type__"} if value.get("__type__") == "update" else set())
    if keys != {"text", "files"} or not isinstance(files, list) or len(files) > MAX_FILES:
        raise _bad("data")
    written = [_file(each, belongs) for each in files]
    if len({each["path"] for each in written}) < len(written):
        raise _bad("files")
    return {"text": _text(value["text"], "text"), "files": written}


def _file(value: Any, belongs: Callable[[str], bool]) -> dict[str, Any]:
    """gradio's description of an upload, without the address that a browser shows it by."""
    if not isinstance(value, dict) or not value.keys() <= FILE_KEYS or value.get("meta") != FILE_META:
        raise _bad("files")
    path, url = value.get("path"), value.get("url")
    if not isinstance(path, str) or not belongs(path):
        raise Refusal(403, NOT_YOURS)
    if url is not None and not (isinstance(url, str) and unquote(url).endswith("/gradio_api/file=" + path)):
        raise Refusal(403, NOT_YOURS)
    if value.get("is_stream") not in (None, False):
        raise _bad("files")
    return {
        "path": path,
        "orig_name": None if value.get("orig_name") is None else _text(value["orig_name"], "files"),
        "mime_type": None if value.get("mime_type") is None else _text(value["mime_type"], "files"),
        "size": _number(value.get("size"), "files"),
        "meta": FILE_META,
    }


def _event(value: Any) -> dict[str, Any] | float | None:
    """What was chosen: plain values by name, or flat lists of them; of a slider that was let go, its number."""
    if value is None or isinstance(value, (int, float)):
        return _plain(value, "event_data")
    if not isinstance(value, dict) or len(value) > MAX_ITEMS or value.keys() & {*FILE_KEYS, "files", "_type"}:
        raise _bad("event_data")
    return {
        _text(key, "event_data"): [_chosen(each) for each in item] if isinstance(item, list) else _chosen(item)
        for key, item in value.items()
    }


def _chosen(value: Any) -> Any:
    """A token of an answer, which may be any text, also one like a path or JSON (`/`, `{`); else a plain value."""
    return _text(value, "event_data") if isinstance(value, str) else _plain(value, "event_data")


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, str):
        if FILE_LIKE.match(value):
            raise Refusal(403, NOT_YOURS)
        return _text(value, where)
    if value is not None and not (isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER):  # nor NaN
        raise _bad(where)
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _bad(where)
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise _bad(where) from None
    return value


def _number(value: Any, where: str) -> int | None:
    if value is not None and not (type(value) is int and abs(value) <= MAX_NUMBER):
        raise _bad(where)
    return value


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not SESSION.fullmatch(value):
        raise _bad(where)
    return value


def _bad(where: str) -> Refusal:
    return Refusal(400, f"The request is not one that the page sends ({where}).")
