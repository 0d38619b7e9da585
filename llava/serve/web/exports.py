"""A conversation as a file: JSON, or a page that holds its images too; and a conversation from such a file.

Files of images don't go out, as a DICOM file may name its patient: only their SHA-256 and, in a page, the views that
were looked at. Needs no gradio.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

from markupsafe import Markup
from PIL import Image
from pydantic import AfterValidator, Field, ValidationError

from llava.errors import LlavaError
from llava.pages import figures, folded, note, page_text, picture, preformatted, subheading, table
from llava.sampling_params import Fields
from llava.serve.request_models import MAX_IMAGES, ModelName
from llava.serve.web.chat_state import (
    LARGE,
    MOST_TEXT,
    SIDES,
    TOO_LONG,
    Chat,
    Exchange,
    Reply,
    UploadedImage,
    text_length,
)

MOST_TURNS = 512
MOST_SAID = 8 << 10  # characters of how a question was sampled, or an image shown
MAX_JSON_BYTES = 12 * MOST_TEXT + (1 << 20)
"""Of the conversation in a file: JSON writes a character in at most 12 bytes."""
OPENS, CLOSES = b"<pre>", b"</pre>"  # of the part with the JSON, which is the last one
SOURCE = b' src="data:image/'  # of an image; what visitors and models wrote has no quotation mark in a page
ENTITIES = {b"&lt;": b"<", b"&gt;": b">", b"&#34;": b'"', b"&#39;": b"'", b"&quot;": b'"', b"&amp;": b"&"}
"""As the page's template writes them, and a browser that saves the page anew; `&` is the last."""
NO_EXPORT = "it isn't an export of this page; export the conversation anew"


def _short(said: dict[str, Any] | None) -> dict[str, Any] | None:
    if said is not None and len(json.dumps(said)) > MOST_SAID:
        raise ValueError(f"more than {MOST_SAID} characters")
    return said


Text = Annotated[str, Field(max_length=MOST_TEXT)]
Said = Annotated[dict[str, Any], AfterValidator(_short)]
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
    sampling: Said = Field({})
    images: list[Digest] = Field([], max_length=MAX_IMAGES)
    image_options: list[Said | None] = Field([], max_length=MAX_IMAGES)
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
    return content[:1024].lstrip()[:9].lower().startswith((b"{", b"<!doctype"))


def read_export(content: bytes, open_upload: Callable[..., Image.Image]) -> tuple[list[Exchange], int]:
    """(the conversation, how many of its images the file doesn't hold).

    Raises:
        LlavaError: it is no export, or its texts are too long; ImageError: an image of it can't be opened.
    """
    data, views = _parts(content)
    if len(data) > MAX_JSON_BYTES:
        raise LlavaError(NO_EXPORT)
    try:
        turns = _Export.model_validate_json(data).turns
    except ValidationError as error:
        raise LlavaError(NO_EXPORT) from error
    count = sum(len(turn.images) for turn in turns)
    if count > MAX_IMAGES or (views and len(views) != count):
        raise LlavaError(f"it names {count} images and holds {len(views)}; at most {MAX_IMAGES} are taken")
    exchanges = [_exchange(turn) for turn in turns]
    if text_length(exchanges) > MOST_TEXT:
        raise LlavaError(TOO_LONG)
    left = iter(views)
    for exchange, turn in zip(exchanges, turns, strict=True):
        exchange.images = _images(turn, left, open_upload)
    return exchanges, count - len(views)


def _parts(content: bytes) -> tuple[bytes, list[bytes]]:
    """(the JSON, the images as base64) of a file. A page isn't parsed but searched a fixed number of times from end to
    end: time grows with its size and with nothing else in it."""
    if content[:1024].lstrip().startswith(b"{"):
        return content, []
    head, opens, tail = content.rpartition(OPENS)
    data, closes, _ = tail.partition(CLOSES)
    if not (opens and closes) or len(data) > MAX_JSON_BYTES:
        raise LlavaError(NO_EXPORT)
    for written, meant in ENTITIES.items():
        data = data.replace(written, meant)
    _, *sources = head.split(SOURCE, MAX_IMAGES + 1)
    return data, [source.partition(b'"')[0].partition(b",")[2] for source in sources]


def _exchange(turn: _Turn) -> Exchange:
    """Without its images."""
    replies: list[Reply | None] = [
        Reply(each.model, each.text, each.error or "", is_whole=each.whole) for each in turn.answers
    ]
    replies += [None] * (SIDES - len(replies))
    return Exchange(turn.question, (), replies, turn.asked, turn.sampling)


def _images(turn: _Turn, views: Iterator[bytes], open_upload: Callable[..., Image.Image]) -> tuple[UploadedImage, ...]:
    """Those that the file holds; `views` are what is left of its images, as base64."""
    options = [*turn.image_options, *[None] * len(turn.images)]
    named = zip(turn.images, options, views, strict=False)
    return tuple(
        _image(view, digest.partition(":")[2], {**(said or {}), "reopened": REOPENED}, open_upload)
        for digest, said, view in named
    )


def _image(view: bytes, digest: str, said: dict[str, Any], open_upload: Callable[..., Image.Image]) -> UploadedImage:
    try:
        content = base64.b64decode(view, validate=True)
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
