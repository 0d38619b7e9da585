"""What the page tells browsers and asks of them: a key, no contents of other sites, no frame of it in theirs."""

import base64
import binascii
from collections.abc import Callable

from llava.serve.api.keys import Keys
from llava.serve.protocol import ErrorType, ServeError

# gradio's page has scripts and styles in its HTML, and makes functions of text. What matters here is that nothing of
# an answer, as an image in its Markdown, makes the browser ask another server and so tell it of the conversation.
POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "media-src": "'self' data: blob:",
    "connect-src": "'self'",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
}


class BrowserHeaders:
    """ASGI middleware around all of the page, its errors too.

    Args:
        embed: whether the page may stand in pages of other sites.
    """

    def __init__(self, app, embed: bool = False):
        self.app = app
        policy = POLICY | {"frame-ancestors": "*" if embed else "'self'"}
        self.headers = [
            (b"content-security-policy", "; ".join(f"{name} {value}" for name, value in policy.items()).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
        ]
        if not embed:
            self.headers.append((b"x-frame-options", b"SAMEORIGIN"))

    async def __call__(self, scope, receive, send):
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                # No other site may read the page, whatever gradio says of it.
                headers = [each for each in message["headers"] if not each[0].lower().startswith(b"access-control-")]
                if message["status"] == 401:
                    headers.append((b"www-authenticate", b'Basic realm="key", charset="UTF-8"'))
                # An upload that is shown has a stricter policy of its own.
                own = {name.lower() for name, _ in headers}
                message = {**message, "headers": headers + [(n, value) for n, value in self.headers if n not in own]}
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def visitor_check(keys: Keys) -> Callable[[dict[str, str]], ServeError | None]:
    """`authorize` for the page: a browser asks its user for name and password; the password is one of the keys."""

    def authorize(headers: dict[str, str]) -> ServeError | None:
        if keys.find(_as_bearer(headers)) is not None:
            return None
        return ServeError(ErrorType.UNAUTHORIZED, "The page needs a key: give it as the password, with any name.")

    return authorize


def visitor_key(keys: Keys) -> Callable[[dict[str, str]], str]:
    """From a request's headers the name of its key; "" where no key is asked for."""

    def name(headers: dict[str, str]) -> str:
        key = keys.find(_as_bearer(headers)) if keys.required else None
        return key.name if key else ""

    return name


def _as_bearer(headers: dict[str, str]) -> dict[str, str]:
    scheme, _, content = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return headers
    try:
        _, _, password = base64.b64decode(content.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        password = ""
    return {**headers, "authorization": f"Bearer {password}"}
