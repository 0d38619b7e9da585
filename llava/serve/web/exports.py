"""A conversation as a file: JSON, or a page that holds its images too; and a conversation from such a file.

Files of images don't go out, as a DICOM file may name its patient: only their SHA-256 and, in a page, the views that
were looked at. Needs no gradio.
"""

import base64
import binascii
import json
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Annotated, Any

from markupsafe import Markup
from PIL import Image
from pydantic import Field, ValidationError

from llava.errors import LlavaError
from llava.pages import figures, folded, note, page_text, picture, preformatted, subheading, table
from llava.sampling_params import Fields
from llava.serve.request_models import MAX_IMAGES, MAX_TEXT, ModelName
from llava.serve.web.chat_state import LARGE, SIDES, Chat, Exchange, Reply, UploadedImage

MOST_TURNS = 512
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
REOPENED = f"a view of at most {LARGE} pixels, from an exported page"


class _Answer(Fields):
    model: ModelName
    text: Text
    error: Text | None = None
    whole: bool = False


class _Turn(Fields):
    question: Text
    asked: Annotated[str, Field(max_length=40)] = ""
    sampling: dict[str, Any] = Field({})
    images: list[Digest] = Field([], max_length=MAX_IMAGES)
    image_options: list[dict[str, Any] | None] = Field([], max_length=MAX_IMAGES)
    answers: list[_Answer] = Field([], max_length=SIDES)


class _Export(Fields):
    turns: list[_Turn] = Field(min_length=1, max_length=MOST_TURNS)


def as_json(chat: Chat) -> str:
    """The record of a conversation with the time of the export."""
    return json.dumps({"exported": _now(), **chat.record()}, indent=1)


def as_page(chat: Chat) -> str:
    """HTML that needs nothing else: questions with their images, answers, how they were made, and the JSON."""
    sections = [(f"Question {number}", _section(each)) for number, each in enumerate(chat.exchanges, 1)]
    models = sorted({reply.model for each in chat.exchanges for reply in each.replies if reply})
    data = folded("The conversation as JSON; the page opens it again", preformatted([as_json(chat)]))
    summary = f"Exported {_now()}. Models: {', '.join(models)}."
    return page_text("A conversation with LLaVA-Med", summary, [*sections, ("Data", data)])


def is_export(content: bytes) -> bool:
    """Whether a file may be an export, by its first bytes; images begin otherwise."""
    return content.lstrip()[:9].lower().startswith((b"{", b"<!doctype"))


def read_export(content: bytes, open_upload: Callable[..., Image.Image]) -> tuple[list[Exchange], int]:
    """(the conversation, how many of its images the file doesn't hold).

    Raises:
        LlavaError: it is no export; ImageError: an image of it can't be opened.
    """
    text = content.decode("utf-8", errors="replace")
    views: list[str] = []
    if not text.lstrip().startswith("{"):
        page = _Page()
        page.feed(text)
        text, views = page.data, page.views
    try:
        turns = _Export.model_validate_json(text).turns
    except ValidationError as error:
        raise LlavaError("it isn't an export of this page; export the conversation anew") from error
    count = sum(len(turn.images) for turn in turns)
    if count > MAX_IMAGES or (views and len(views) != count):
        raise LlavaError(f"it names {count} images and holds {len(views)}; at most {MAX_IMAGES} are taken")
    left = iter(views)
    return [_exchange(turn, left, open_upload) for turn in turns], count - len(views)


def _exchange(turn: _Turn, views: Any, open_upload: Callable[..., Image.Image]) -> Exchange:
    images = []
    options = [*turn.image_options, *[None] * len(turn.images)]
    for digest, said in zip(turn.images, options, strict=False):
        if (url := next(views, None)) is not None:
            images.append(_image(url, digest.partition(":")[2], {**(said or {}), "reopened": REOPENED}, open_upload))
    replies: list[Reply | None] = [
        Reply(each.model, each.text, each.error or "", is_whole=each.whole) for each in turn.answers
    ]
    replies += [None] * (SIDES - len(replies))
    return Exchange(turn.question, tuple(images), replies, turn.asked, turn.sampling)


def _image(url: str, digest: str, said: dict[str, Any], open_upload: Callable[..., Image.Image]) -> UploadedImage:
    try:
        content = base64.b64decode(url.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise LlavaError("an image of it can't be read") from error
    image = UploadedImage.from_bytes(content, open_upload)
    return UploadedImage(image.url, image.large, image.thumbnail, digest, said=said)


def _section(exchange: Exchange) -> Markup:
    parts = [note(f"Asked {exchange.asked}.")] if exchange.asked else []
    parts.append(preformatted([exchange.text]))
    parts.append(figures(*(picture(image.large, _words(image)) for image in exchange.images)))
    for reply in exchange.replies:
        if reply is not None:
            parts += [subheading(reply.model), preformatted([reply.text or reply.error])]
            state = [] if reply.is_whole else [f"not whole: {reply.error or 'stopped'}"]
            if state or reply.speed:
                parts.append(note(", ".join([*state, reply.speed]).strip(", ") + "."))
    rows = [[name.replace("_", " "), str(value)] for name, value in exchange.sampling.items()]
    if rows:
        parts.append(folded("Sampling", table(["Parameter", "Value"], rows)))
    return Markup().join(parts)


def _words(image: UploadedImage) -> str:
    """Of an image: its hash, and how a scan was shown."""
    shown = [f"{name} {value}" for name, value in (image.said or {}).items() if name != "shown"]
    shown += [str(line) for line in (image.said or {}).get("shown", ())]
    return "; ".join([*shown, f"sha256 {image.sha256}"])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Page(HTMLParser):
    """`data` is the text of the last block, which holds the JSON; `views` are the images."""

    def __init__(self) -> None:
        super().__init__()
        self.data, self._is_in = "", False
        self.views: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "pre":
            self.data, self._is_in = "", True
        source = dict(attrs).get("src") if tag == "img" else None
        if source and source.startswith("data:image/"):
            self.views.append(source)

    def handle_endtag(self, tag: str) -> None:
        self._is_in = self._is_in and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._is_in:
            self.data += data
