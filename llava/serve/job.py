"""What a client asks a worker for, checked: `read_job(body)` is the one place that reads such a request.

A request holds either `prompt` (text ready for the model, as LLaVA's clients send it) or `messages` (OpenAI's form,
put into words by the worker with its checkpoint's template). Images come as base64, never as paths or addresses.
Needs no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.errors import amount
from llava.image_options import ImageOptions, ImageWithOptions
from llava.sampling_params import SamplingParams
from llava.serve.protocol import ErrorType, ServeError
from llava.serve.request_models import MAX_IMAGES, AttentionMapRequest, ChatMessage, GenerateRequest, Part
from llava.serve.transport.bodies import validated

_HARMLESS_PLACEHOLDER = "< image>"

SentImage = str | ImageWithOptions
"""Base64 or a data: URL, or one of them with how it is shown."""


@dataclass(frozen=True)
class Message:
    """One turn; `text` holds one `<image>` for each of its `images`, in their places."""

    role: str
    text: str
    images: tuple[SentImage, ...] = ()


@dataclass(frozen=True)
class Job:
    """A checked request; exactly one of `prompt` and `messages` is there."""

    model: str
    prompt: str | None
    messages: tuple[Message, ...] | None
    images: tuple[SentImage, ...]
    """In the order of their places in the text."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    token_ids: bool = False
    """Report them too: what a later request for a look needs."""
    stream: bool = True
    """False sends one chunk, at the end; with logprobs as many as they need."""
    request_id: str | None = None


def read_job(body: Mapping[str, Any]) -> Job:
    """A Job from the JSON of /worker_generate_stream.

    Raises:
        ServeError: BAD_REQUEST that names the field, BAD_IMAGE.
    """
    return _to_job(validated(body, GenerateRequest))


def read_attention_map_request(body: Mapping[str, Any]) -> tuple[Job, list[int]]:
    """(what was asked, the answer's token ids) from the JSON of /worker_attention_map.

    Raises:
        ServeError: BAD_REQUEST that names the field, BAD_IMAGE.
    """
    request = validated(body, AttentionMapRequest)
    return _to_job(request), request.token_ids


def to_conversation(messages: Sequence[Message], template: Conversation) -> Conversation:
    """The messages as a conversation of `template`, ready for the model's answer."""
    conversation = template.copy()
    for message in messages:
        if message.role == "system":
            conversation.set_system(message.text)
        else:
            conversation.append_message(conversation.roles[message.role == "assistant"], message.text)
    return conversation


def _to_job(request: GenerateRequest) -> Job:
    messages: tuple[Message, ...] | None = None
    if request.prompt is not None and request.messages is None:
        images: tuple[SentImage, ...] = tuple(request.images)
        places = request.prompt.count(DEFAULT_IMAGE_TOKEN)
    elif request.prompt is None and request.messages is not None:
        messages = _read_messages(request.messages, request.images)
        images = tuple(image for message in messages for image in message.images)
        places = len(images)
    else:
        raise _bad("prompt: give either prompt or messages")
    if places != len(images):
        raise _bad(f"images: the prompt has {places} {DEFAULT_IMAGE_TOKEN} for {amount(len(images), 'image')}")
    if len(images) > MAX_IMAGES:
        raise _bad(f"images: {len(images)} are more than the {MAX_IMAGES} allowed")
    return Job(
        model=request.model,
        prompt=request.prompt,
        messages=messages,
        images=images,
        sampling=request.sampling(),
        token_ids=request.return_token_ids,
        stream=request.stream,
        request_id=request.known_request_id(),
    )


def _read_messages(messages: Sequence[ChatMessage], loose: Iterable[str] = ()) -> tuple[Message, ...]:
    """OpenAI's messages as turns. A part of type `image` takes the next of `loose`. Neighbouring turns of one role
    are joined by a line break.

    Raises:
        ServeError: BAD_REQUEST, BAD_IMAGE.
    """
    rest = list(loose)[::-1]
    pieces = [_read_message(message, number, rest) for number, message in enumerate(messages)]
    turns = []
    for role, group in groupby(pieces, lambda piece: piece.role):
        same = list(group)
        images = tuple(image for piece in same for image in piece.images)
        turns.append(Message(role, "\n".join(piece.text for piece in same), images))
    if rest:
        raise _bad(f"images: {len(rest)} have no place in the messages")
    if any(turn.role == "system" for turn in turns[1:]):
        raise _bad("messages: a system message has to come first")
    if turns[-1].role != "user":
        raise _bad("messages: the last message has to be the user's")
    if turns[0].role == "assistant" or (turns[0].role == "system" and turns[1].role == "assistant"):
        raise _bad("messages: the conversation has to begin with the user")
    return tuple(turns)


def _read_message(message: ChatMessage, number: int, loose: list[str]) -> Message:
    """One message by itself; `loose` are the images that still need a place, the next one last."""
    role = "system" if message.role == "developer" else message.role
    pieces: list[str] = []
    images: list[SentImage] = []
    for place, part in enumerate(message.content):
        where = f"messages.{number}.content.{place}"
        if part.type == "text":
            pieces.append(_read_text(part, role, where))
        elif role != "user":
            raise _bad(f"{where}: only the user's messages can hold images")
        else:
            image = _read_image(part, where, loose)
            options = ImageOptions.parse(part.image_options or {})
            images.append(ImageWithOptions(image, options) if options else image)
            pieces.append(DEFAULT_IMAGE_TOKEN)
    return Message(role, "\n".join(piece for piece in pieces if piece), tuple(images))


def _read_text(part: Part, role: str, where: str) -> str:
    if part.text is None:
        raise _bad(f"{where}.text: Field required")
    if part.image_options:
        raise _bad(f"{where}.image_options: they belong to an image, not to a text")
    if role == "assistant":
        # A model may have said it; it must not become the place of an image in the next turn.
        return part.text.replace(DEFAULT_IMAGE_TOKEN, _HARMLESS_PLACEHOLDER)
    if DEFAULT_IMAGE_TOKEN in part.text:
        raise _bad(f"{where}.text: it can't hold {DEFAULT_IMAGE_TOKEN}; send the image as a part")
    return part.text


def _read_image(part: Part, where: str, loose: list[str]) -> str:
    if part.type == "image":
        if not loose:
            raise _bad(f"{where}: images has no image for this place")
        return loose.pop()
    if part.image_url is None:
        raise _bad(f"{where}.image_url: Field required")
    if part.image_url.url[:5].lower() != "data:":
        words = f"{where}.image_url: images are taken as data: URLs only; nothing is fetched from an address"
        raise ServeError(ErrorType.BAD_IMAGE, words)
    return part.image_url.url


def _bad(words: str) -> ServeError:
    return ServeError(ErrorType.BAD_REQUEST, words)
