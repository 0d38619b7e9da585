"""A conversation of the web page: questions with images, answers of one or two models side by side.

It is in the server's memory alone. Needs neither torch nor gradio.
"""

import base64
import hashlib
import html
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava.image_options import NO_OPTIONS, ImageOptions, ImageWithOptions
from llava.images import open_uploaded_image

if TYPE_CHECKING:
    from gradio.components.chatbot import Message, MessageDict

    from llava.serve.web.scans import Scan

SIDES = 2
THUMBNAIL = 320  # pixels of the longer side


@dataclass(frozen=True)
class UploadedImage:
    """`url` is the file as it came, `thumbnail` a small PNG; both data: URLs. Of a DICOM or NIfTI file also how it is
    shown: `options`, and `said`, what of it is written down beside the answer."""

    url: str
    thumbnail: str
    sha256: str
    options: ImageOptions = NO_OPTIONS
    said: dict[str, Any] | None = None

    @classmethod
    def from_bytes(
        cls,
        content: bytes,
        open_upload: Callable = open_uploaded_image,
        options: ImageOptions = NO_OPTIONS,
        said: dict[str, Any] | None = None,
    ) -> "UploadedImage":
        """`open_upload` opens it; raises an ImageError for what is no image, or is too large."""
        image = open_upload(ImageWithOptions(content, options) if options else content)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        digest = hashlib.sha256(content).hexdigest()
        thumbnail = _data_url("image/png", buffer.getvalue())
        return cls(_data_url("application/octet-stream", content), thumbnail, digest, options, said)

    def part(self) -> dict[str, Any]:
        """As a message to a worker has it."""
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": self.url}}
        return part | {"image_options": self.options.as_dict()} if self.options else part


@dataclass
class Reply:
    """One model's answer: `error` are words for the user, with `request_id` for whoever runs the server."""

    model: str
    text: str = ""
    error: str = ""
    request_id: str = ""
    is_whole: bool = False
    token_ids: list[int] = field(default_factory=list)
    """What was said so far, where the worker tells."""


@dataclass
class Exchange:
    text: str
    images: tuple[UploadedImage, ...] = ()
    replies: list[Reply | None] = field(default_factory=lambda: [None] * SIDES)


@dataclass
class Chat:
    """`draft` are the images of the question being written; `stopping` asks a `running` answer to end.

    `scans` are the DICOM and NIfTI files of which a view is chosen, `taken` the uploads that were read.
    """

    exchanges: list[Exchange] = field(default_factory=list)
    draft: list[UploadedImage] = field(default_factory=list)
    scans: list["Scan"] = field(default_factory=list)
    current: int = 0
    """Which of the scans is shown."""
    taken: set[str] = field(default_factory=set)
    reading: int = 0
    """How many uploads are being read."""
    running: bool = False
    stopping: bool = False

    def messages(self, side: int) -> list[dict[str, Any]]:
        """What a worker gets: the questions that this side has answered so far, and the last one."""
        messages = []
        for exchange in self.exchanges:
            reply = exchange.replies[side]
            said = reply.text if reply else ""
            is_last = exchange is self.exchanges[-1]
            if not is_last and not said:
                continue
            content = [*(image.part() for image in exchange.images), {"type": "text", "text": exchange.text}]
            messages.append({"role": "user", "content": content})
            if not is_last:
                messages.append({"role": "assistant", "content": said})
        return messages

    def shown(self, side: int) -> "list[MessageDict | Message]":
        """What the page shows on one side, as the chat component takes it."""
        shown: list[MessageDict | Message] = []
        for exchange in self.exchanges:
            reply = exchange.replies[side]
            if reply is None:
                continue
            shown.append({"role": "user", "content": f"{thumbnails(exchange.images)}{_plain(exchange.text)}"})
            parts = [reply.text or ("" if reply.error or reply.is_whole else "…")]
            if reply.error:
                parts.append(f"**{html.escape(reply.error)}** (request {reply.request_id})")
            shown.append({"role": "assistant", "content": "\n\n".join(part for part in parts if part)})
        return shown

    def record(self) -> dict[str, Any]:
        """The conversation as it is exported and kept; images by their SHA-256, not their content, with how they were
        shown."""
        turns = [
            {
                "question": exchange.text,
                "images": [f"sha256:{image.sha256}" for image in exchange.images],
                **_said(exchange.images),
                "answers": [
                    {"model": reply.model, "text": reply.text, "error": reply.error or None, "whole": reply.is_whole}
                    for reply in exchange.replies
                    if reply is not None
                ],
            }
            for exchange in self.exchanges
        ]
        return {"notice": "Research only, not for clinical use.", "turns": turns}


def thumbnails(images: list[UploadedImage] | tuple[UploadedImage, ...]) -> str:
    """HTML of the images in a row."""
    shown = "".join(
        f'<img class="thumb" alt="Image {number}" src="{image.thumbnail}">' for number, image in enumerate(images, 1)
    )
    return f'<span class="thumbs">{shown}</span>' if shown else ""


def _said(images: tuple[UploadedImage, ...]) -> dict[str, Any]:
    said = [image.said for image in images]
    return {"image_options": said} if any(said) else {}


def _plain(text: str) -> str:
    """Text shown as it was typed, not as HTML."""
    return html.escape(text).replace("\n", "<br>")


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
