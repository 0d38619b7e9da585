"""What a client asks a worker for, checked: `read_job(body)` is the one place that reads such a request.

A request holds either `prompt` (text ready for the model, as LLaVA's clients send it) or `messages` (OpenAI's form,
put into words by the worker with its checkpoint's template). Images come as base64, never as paths or addresses.
Needs no torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle
from llava.serve.protocol import ErrorType, ServeError

MAX_IMAGES = 32
MAX_STOPS = 8
MAX_TOP_LOGPROBS = 20
DEFAULT_NEW_TOKENS = 256
ROLES = ("system", "developer", "user", "assistant")
_HARMLESS_PLACEHOLDER = "< image>"
_REQUEST_ID = re.compile(r"req-[0-9a-f]{16}")


@dataclass(frozen=True)
class Message:
    """One turn; `text` holds one `<image>` for each of its `images` (base64 or data URLs), in their places."""

    role: str
    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A checked request; exactly one of `prompt` and `messages` is there."""

    model: str
    prompt: str | None
    messages: tuple[Message, ...] | None
    images: tuple[str, ...]
    """In the order of their places in the text."""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    """How many alternatives to report at each position; None reports nothing."""
    ignore_eos: bool = False
    """Go on to `max_new_tokens` whatever the model says; for measurements."""
    token_ids: bool = False
    """Report them too: what a later request for a look needs."""
    stream: bool = True
    """False sends one chunk, at the end."""
    request_id: str | None = None


def read_job(body: Mapping[str, Any]) -> Job:
    """A Job from the JSON of /worker_generate_stream.

    Raises:
        ServeError: BAD_REQUEST that names the field.
    """
    if (body.get("prompt") is None) == (body.get("messages") is None):
        raise _bad("give either prompt or messages")
    loose = tuple(_base64_texts(body.get("images") or ()))
    if body.get("messages") is None:
        prompt, messages, images = _text(body["prompt"], "prompt"), None, loose
        if not prompt:
            raise _bad("prompt is empty")
        places = prompt.count(DEFAULT_IMAGE_TOKEN)
    else:
        prompt, messages = None, read_messages(body["messages"], loose)
        images = tuple(image for message in messages for image in message.images)
        places = len(images)
    if places != len(images):
        raise _bad(f"the prompt has {places} {DEFAULT_IMAGE_TOKEN} but {len(images)} image(s) came with it")
    if len(images) > MAX_IMAGES:
        raise _bad(f"{len(images)} images are more than the {MAX_IMAGES} allowed")
    request_id = body.get("request_id")
    return Job(
        model=_text(body.get("model") or "", "model"),
        prompt=prompt,
        messages=messages,
        images=images,
        temperature=_number(body, "temperature", 0.0, 0.0, 10.0),
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
        max_new_tokens=int(_number(body, "max_new_tokens", DEFAULT_NEW_TOKENS, 1, 1_000_000)),
        stop=_stops(body.get("stop")),
        seed=None if body.get("seed") is None else int(_number(body, "seed", 0, -(2**63), 2**64 - 1)),
        logprobs=_logprobs(body.get("logprobs")),
        ignore_eos=bool(body.get("ignore_eos", False)),
        token_ids=bool(body.get("return_token_ids", False)),
        stream=bool(body.get("stream", True)),
        request_id=request_id if isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id) else None,
    )


def read_attention_map_request(body: Mapping[str, Any]) -> tuple[Job, list[int]]:
    """(what was asked, the answer's token ids) from the JSON of /worker_attention_map.

    Raises:
        ServeError: BAD_REQUEST that names the field.
    """
    token_ids = body.get("token_ids")
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, str) or not token_ids:
        raise _bad("token_ids has to be a list of an answer's ids")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in token_ids):
        raise _bad("token_ids has to hold integers")
    return read_job(body), list(token_ids)


def read_messages(messages: Any, loose: Sequence[str] = ()) -> tuple[Message, ...]:
    """OpenAI's messages as turns. Content is text or parts: text, image_url (data URLs only), or `{"type": "image"}`,
    which takes the next of `loose`. Neighbouring turns of one role are joined by a line break.

    Raises:
        ServeError: BAD_REQUEST.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise _bad("messages has to be a list of at least one message")
    rest, turns = list(loose), []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise _bad(f"messages.{number}: role has to be one of {', '.join(ROLES)}")
        role = "system" if message["role"] == "developer" else message["role"]
        turn = _read_content(message.get("content"), role, number, rest)
        if turns and turns[-1].role == role:
            last = turns.pop()
            turn = Message(role, f"{last.text}\n{turn.text}", last.images + turn.images)
        turns.append(turn)
    if rest:
        raise _bad(f"{len(rest)} image(s) of images have no place in the messages")
    if any(turn.role == "system" for turn in turns[1:]):
        raise _bad("a system message has to come first")
    if turns[-1].role != "user":
        raise _bad("the last message has to be the user's")
    if turns[0].role == "assistant" or (turns[0].role == "system" and turns[1].role == "assistant"):
        raise _bad("the conversation has to begin with the user")
    return tuple(turns)


def to_conversation(messages: Sequence[Message], template: Conversation) -> Conversation:
    """The messages as a conversation of `template`, ready for the model's answer."""
    conversation = template.copy()
    for message in messages:
        if message.role == "system":
            chatml = conversation.sep_style is SeparatorStyle.MPT
            conversation.system = f"<|im_start|>system\n{message.text}" if chatml else message.text
        else:
            conversation.append_message(conversation.roles[message.role == "assistant"], message.text)
    return conversation


def _read_content(content: Any, role: str, number: int, loose: list[str]) -> Message:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not parts:
        raise _bad(f"messages.{number}: content has to be text or a list of parts")
    pieces: list[str] = []
    images: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text = _text(part.get("text"), f"messages.{number}: text")
            if role == "assistant":
                # A model may have said it; it must not become the place of an image in the next turn.
                text = text.replace(DEFAULT_IMAGE_TOKEN, _HARMLESS_PLACEHOLDER)
            if DEFAULT_IMAGE_TOKEN in text:
                raise _bad(f"messages.{number}: text can't hold {DEFAULT_IMAGE_TOKEN}; send the image as a part")
            pieces.append(text)
            continue
        if role != "user":
            raise _bad(f"messages.{number}: only the user's messages can hold images")
        if kind == "image_url":
            images.append(_data_url(part.get("image_url"), number))
        elif kind == "image" and loose:
            images.append(loose.pop(0))
        else:
            raise _bad(f"messages.{number}: a part has to be of type text or image_url")
        pieces.append(DEFAULT_IMAGE_TOKEN)
    return Message(role, "\n".join(piece for piece in pieces if piece), tuple(images))


def _data_url(value: Any, number: int) -> str:
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or url[:5].lower() != "data:":
        words = f"messages.{number}: images are taken as data: URLs only; nothing is fetched from an address"
        raise ServeError(ErrorType.BAD_IMAGE, words)
    return url


def _base64_texts(images: Any) -> list[str]:
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise _bad("images has to be a list of base64 texts")
    return [_text(image, "images") for image in images]


def _stops(stop: Any) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or len(stops) > MAX_STOPS:
        raise _bad(f"stop has to be a text or a list of at most {MAX_STOPS}")
    return tuple(_text(text, "stop") for text in stops if text)


def _logprobs(value: Any) -> int | None:
    if value is None or value is False:
        return None
    if value is True:
        return 0
    return int(_number({"logprobs": value}, "logprobs", 0, 0, MAX_TOP_LOGPROBS))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _bad(f"{name} has to be text")
    return value


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise _bad(f"{name} has to be a number from {low:g} to {high:g}")
    return value


def _bad(words: str) -> ServeError:
    return ServeError(ErrorType.BAD_REQUEST, words)
