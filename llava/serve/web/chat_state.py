"""A conversation of the web page: questions with images, answers of one or two models side by side.

It is in the server's memory alone. Needs neither torch nor gradio.
"""

import base64
import hashlib
import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava.image_options import NO_OPTIONS, ImageOptions, ImageWithOptions
from llava.images import open_uploaded_image, png_data_url

if TYPE_CHECKING:
    from gradio.components.chatbot import Message, MessageDict

    from llava.serve.web.scans import Scan

SIDES = 2
THUMBNAIL = 320  # pixels of the longer side
LARGE = 1024  # of the image that is looked at
MOST_TEXT = 1 << 18
"""Characters of all questions and answers of a conversation: twice what a context of 32,768 tokens takes."""
TOO_LONG = f"A conversation holds at most {MOST_TEXT:,} characters. Clear it first."


@dataclass(frozen=True)
class UploadedImage:
    """`url` is the file as it came, `large` and `thumbnail` PNGs of it; all data: URLs. Of a DICOM or NIfTI file also
    how it is shown: `options`, `said`, what of it is written down beside the answer, and `view`, the scan's name and
    what it is drawn of (`Scan.view_key`)."""

    url: str
    large: str
    thumbnail: str
    sha256: str
    options: ImageOptions = NO_OPTIONS
    said: dict[str, Any] | None = None
    view: tuple[str, Any] | None = None

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
        digest = hashlib.sha256(content).hexdigest()
        url = f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
        return cls(url, reduced_url(image, LARGE), reduced_url(image, THUMBNAIL), digest, options, said)

    @property
    def size(self) -> int:
        """Bytes that it takes in memory."""
        return len(self.url) + len(self.large) + len(self.thumbnail)

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
    first_seconds: float | None = None
    """From the question to the first word; `seconds` to the last one."""
    seconds: float | None = None

    @property
    def speed(self) -> str:
        """Both in words, for who asks; "" where nothing is known."""
        if self.first_seconds is None or self.seconds is None:
            return ""
        said = f"{self.first_seconds:.2f} s to the first word"
        spent = self.seconds - self.first_seconds
        more = len(self.token_ids) - 1
        return f"{said}, {more / spent:.1f} tokens/s" if more > 0 and spent > 0 else said


@dataclass
class Exchange:
    text: str
    images: tuple[UploadedImage, ...] = ()
    replies: list[Reply | None] = field(default_factory=lambda: [None] * SIDES)
    asked: str = ""
    """When, UTC."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """How the last answers were decoded."""


def text_length(exchanges: list[Exchange]) -> int:
    """Characters of all questions and answers."""
    replies = [reply for exchange in exchanges for reply in exchange.replies if reply]
    return sum(len(each.text) for each in exchanges) + sum(len(each.text) + len(each.error) for each in replies)


@dataclass
class Chat:
    """`draft` are the images of the question being written; `stopping` asks a `running` answer to end.

    `scans` are the DICOM and NIfTI files of which a view is chosen, `taken` the uploads that were read, `refused`
    lines on those that couldn't be: no question goes before these were read.
    """

    exchanges: list[Exchange] = field(default_factory=list)
    draft: list[UploadedImage] = field(default_factory=list)
    scans: list["Scan"] = field(default_factory=list)
    current: int = 0
    """Which of the scans is shown."""
    taken: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)
    looked: int | None = None
    """Which of `images` is shown large; None: the view of the current scan, else the last image."""
    is_compared: bool = False
    """Whether the image as the model sees it stands beside it."""
    reading: int = 0
    """How many uploads are being read."""
    running: bool = False
    stopping: bool = False
    is_cleared: bool = False
    """Whether another conversation has taken its place: it is shown no more."""
    shows_speed: bool = False
    votes: set[tuple[str, int, str]] = field(default_factory=set)
    """What was voted, on which question, asked when."""

    def images(self) -> list[UploadedImage]:
        """Those of all questions and of the one being written."""
        return [image for exchange in self.exchanges for image in exchange.images] + self.draft

    def remove(self, number: int) -> None:
        """Take away one of `images` that isn't asked about yet, or, with a higher number, a scan."""
        images = self.images()
        asked = len(images) - len(self.draft)
        if asked <= number < len(images):
            del self.draft[number - asked]
        elif 0 <= number - len(images) < len(self.scans):
            del self.scans[number - len(images)]
            self.current = max(0, min(self.current, len(self.scans) - 1))
        self.looked = None

    def messages(self, side: int) -> list[dict[str, Any]]:
        """What a worker gets: the conversation so far and the last question. What this side hasn't answered, as a model
        that was chosen later, stands there with the other side's answer."""
        messages = []
        for exchange, images, said in self._told(side):
            is_last = exchange is self.exchanges[-1]
            content = [*(image.part() for image in images), {"type": "text", "text": exchange.text}]
            messages.append({"role": "user", "content": content})
            if not is_last:
                messages.append({"role": "assistant", "content": said})
        return messages

    def sent(self, side: int) -> list[UploadedImage]:
        """The images of `messages`."""
        return [image for _, images, _ in self._told(side) for image in images]

    def _told(self, side: int) -> Iterator[tuple[Exchange, tuple[UploadedImage, ...], str]]:
        """What a worker is told of, with its images and the answer that stands for its own. A question without an
        answer is left out; its images, which the page still shows, go with the next one."""
        images: tuple[UploadedImage, ...] = ()
        for exchange in self.exchanges:
            images += exchange.images
            texts = [reply.text for reply in (exchange.replies[side], *exchange.replies) if reply and reply.text]
            if texts or exchange is self.exchanges[-1]:
                yield exchange, images, texts[0] if texts else ""
                images = ()

    def shown(self, side: int) -> "list[MessageDict | Message]":
        """What the page shows on one side, as the chat component takes it."""
        shown: list[MessageDict | Message] = []
        for exchange in self.exchanges:
            reply = exchange.replies[side]
            if reply is None:
                continue
            shown.append({"role": "user", "content": f"{thumbnails(exchange.images)}{_plain(exchange.text)}"})
            parts = [reply.text or ("" if reply.error or reply.is_whole else "…")]
            if self.shows_speed and reply.speed:
                parts.append(f"*{reply.speed}*")
            if reply.error:
                parts.append(f"**{html.escape(reply.error)}** (request {reply.request_id})")
            shown.append({"role": "assistant", "content": "\n\n".join(part for part in parts if part)})
        return shown

    def knows_speed(self, side: int) -> bool:
        """Whether `shown` differs by `shows_speed`."""
        return any(reply.speed for each in self.exchanges if (reply := each.replies[side]) is not None)

    def record(self) -> dict[str, Any]:
        """The conversation as it is exported and kept; images by their SHA-256, not their content, with how they were
        shown."""
        turns = [
            {
                "question": exchange.text,
                "asked": exchange.asked,
                "sampling": exchange.sampling,
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


def reduced_url(image: Image.Image, side: int) -> str:
    """The image as a PNG of at most `side` pixels, as a data: URL."""
    return png_data_url(reduced(image, side))


def reduced(image: Image.Image, side: int) -> Image.Image:
    """A copy of at most `side` pixels."""
    copy = image.copy()
    copy.thumbnail((side, side))
    return copy
