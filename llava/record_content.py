"""What a record's images and turns are: the one reader, for training, evaluation, audit, statistics and splitting.

Images stand under `image` or `images`: one or a list of paths, data URLs, embedded files, or objects that hold one of
these as `path` or `bytes` and, beside it, how it is shown (`llava.image_options`). Turns stand under
`conversations` (some files of the LLaVA-Med release spell it `conversatons`) or `messages`, each with `from` and
`value` or with `role` and `content`. A key whose value is null counts as absent, as Parquet can't leave one out.
"""

import hashlib
import posixpath
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from llava.constants import FIGURE_DOMAINS
from llava.errors import LlavaError
from llava.image_options import ImageWithOptions, read_image_entry

USER, ASSISTANT, SYSTEM = 0, 1, 2
_ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM}
_NAMES = {USER: "human", ASSISTANT: "gpt", SYSTEM: "system"}

OPTION_LETTERS = "ABCDEFGHIJ"
"""Names of the options of a multiple-choice question, in their order."""

TURN_KEYS = ("conversations", "conversatons", "messages")
_SPEAKER_KEYS = ("from", "role")
_TEXT_KEYS = ("value", "content")

RecordOrTurns = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A record, or its list of turns."""


class Turn(NamedTuple):
    role: int
    """USER or ASSISTANT."""
    text: str


class Dialogue(NamedTuple):
    """A record's conversation: what its system turn says, if it begins with one, and the turns of the two speakers."""

    system: str | None
    turns: list[Turn]


def read_dialogue(record: RecordOrTurns) -> Dialogue:
    """The conversation of a record, beginning with whoever comes first. Numbers are taken as text.

    Raises:
        LlavaError: no conversation, a turn that isn't one, an unknown speaker, the same speaker twice in a row, a
            system turn that isn't the first. The message doesn't name the record; the caller knows where it is from.
    """
    system: str | None = None
    turns: list[Turn] = []
    for number, entry in enumerate(_entries(record), 1):
        role, text = _turn(entry, number)
        if role == SYSTEM:
            if number > 1:
                raise LlavaError(f"turn {number} of the conversation is from system, which only the first may be")
            system = text
            continue
        if turns and turns[-1].role == role:
            raise LlavaError(
                f"turns {number - 1} and {number} of the conversation are both from "
                f"{first_given(entry, *_SPEAKER_KEYS)!r}; human and gpt have to alternate"
            )
        turns.append(Turn(role, text))
    if not turns:
        raise LlavaError("the conversation holds a system turn alone; give at least a question and an answer")
    return Dialogue(system, turns)


def read_turns(record: RecordOrTurns) -> list[Turn]:
    """The turns of user and assistant (see `read_dialogue`)."""
    return read_dialogue(record).turns


def read_named(record: Mapping[str, Any], where: str) -> tuple[Any, Dialogue]:
    """(id, conversation) of a record; `where` and the id open the message of an error.

    Raises:
        LlavaError: no id, or what `read_dialogue` refuses.
    """
    key = record.get("id")
    if key is None:
        raise LlavaError(f'{where}: no "id"')
    try:
        return key, read_dialogue(record)
    except LlavaError as error:
        raise LlavaError(f'{where} ("{key}"): {error}') from error


def question_answer_pairs(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """Each question with the answer that follows it; what the assistant says before any question is no answer.

    The turns alternate, as `read_turns` gives them.
    """
    return [(turn.text, reply.text) for turn, reply in pairwise(turns) if turn.role == USER]


def plain_entries(record: RecordOrTurns) -> list[dict[str, Any]]:
    """All turns, checked, as `{"from": "human" | "gpt" | "system", "value": str}`; other keys of a turn are kept."""
    read_dialogue(record)
    spelt = {*_SPEAKER_KEYS, *_TEXT_KEYS}
    entries = []
    for number, entry in enumerate(_entries(record), 1):
        role, text = _turn(entry, number)
        others = {key: value for key, value in entry.items() if key not in spelt}
        entries.append({"from": _NAMES[role], "value": text, **others})
    return entries


def with_entries(record: Mapping[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A copy of the record with these turns under `conversations`, whatever it calls them."""
    rest = {key: value for key, value in record.items() if key not in TURN_KEYS[1:]}
    return {**rest, "conversations": entries}


def has_turns(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a conversation, readable or not."""
    return any(record.get(key) is not None for key in TURN_KEYS)


def record_images(record: Mapping[str, Any]) -> list[Any]:
    """The images that a record names, in order: paths and data URLs as written, or embedded files (`image_bytes`); an
    ImageWithOptions of one of these where the record says how it is shown.

    Raises:
        LlavaError: an image's option is unknown, wrong, or excludes another; it names the image and the option, and not
            the record, which the caller knows.
    """
    image = record.get("image")
    if type(image) is str and image:
        return [image]  # nearly always
    for value in (image, record.get("images")):
        if value is None or value == "":
            continue
        given = value if isinstance(value, (list, tuple)) else (value,)
        images = [_unwrapped(image, place) for place, image in enumerate(given, 1) if image is not None and image != ""]
        if images:
            return images
    return []


def record_options(record: Mapping[str, Any]) -> list[str]:
    """The options of a multiple-choice question (`options`: a list, or texts by letter), empty if there are none.

    Raises:
        LlavaError: fewer than two, more than there are letters, or two that are alike.
    """
    options = record.get("options")
    if options is None:
        return []
    if isinstance(options, Mapping):
        options = [options[letter] for letter in sorted(options) if options[letter] is not None]
    if not isinstance(options, Sequence) or isinstance(options, str):
        raise LlavaError(f'"options" has to be a list of texts, not {type(options).__name__}')
    texts = [as_text(option).strip() for option in options]
    if not 2 <= len(texts) <= len(OPTION_LETTERS) or len({text.lower() for text in texts}) < len(texts):
        raise LlavaError(f'"options" has to be 2 to {len(OPTION_LETTERS)} different texts, got {texts}')
    return texts


def record_domains(record: Mapping[str, Any]) -> list[str]:
    """What a record says under `domain` that its image is: a name, a list of them, or what is true of
    `{"mri": true, …}`."""
    domain = record.get("domain") or []
    if isinstance(domain, Mapping):
        return [name for name, is_true in domain.items() if is_true]
    names = domain if isinstance(domain, (list, tuple)) else [domain]
    return [name for name in names if isinstance(name, str)]


def figure_domain(record: Mapping[str, Any]) -> str | None:
    """The first of `FIGURE_DOMAINS` that a record is of, None if it is of none of them."""
    named = record_domains(record)
    return next((name for name in FIGURE_DOMAINS if name in named), None)


def images_of(record: Mapping[str, Any], where: str) -> list[Any]:
    """`record_images`, whose errors begin with `where`."""
    try:
        return record_images(record)
    except LlavaError as error:
        raise LlavaError(f"{where}: {error}") from error


def first_pair(record: RecordOrTurns, where: str) -> tuple[str, str]:
    """The first question of a record and its answer.

    Raises:
        LlavaError: there is none, or what `read_turns` refuses; `where` opens the message.
    """
    try:
        pairs = question_answer_pairs(read_turns(record))
    except LlavaError as error:
        raise LlavaError(f"{where}: {error}") from error
    if not pairs:
        raise LlavaError(f"{where}: the conversation holds no question with an answer")
    return pairs[0]


def image_file(image: Any) -> Any:
    """One of `record_images` without its options."""
    return image.source if isinstance(image, ImageWithOptions) else image


def image_key(image: Any) -> str:
    """A name that tells distinct images apart: the path (`a.jpg` for `./a.jpg` too), or a digest of an embedded file;
    with its options, as two slices of a volume are two images."""
    if isinstance(image, ImageWithOptions):
        return f"{image_key(image.source)} [{image.options}]"
    if not isinstance(image, str):
        return "sha256:" + hashlib.sha256(image_bytes(image)).hexdigest()
    if image.startswith("data:"):
        return "sha256:" + hashlib.sha256(image.encode()).hexdigest()
    is_spelt_otherwise = ("./" in image or "//" in image) and "://" not in image
    return posixpath.normpath(image) if is_spelt_otherwise else image


def image_bytes(image: Any) -> bytes:
    """The file that is embedded in a record, bare or as `{"bytes": …}` of Parquet.

    Raises:
        LlavaError: it is none.
    """
    image = image_file(image)
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        image = image["bytes"]
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    raise LlavaError(f"an image must be a path, bytes or {{'bytes': …}}, not {type(image).__name__}")


def first_given(record: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of the keys that is there and not null; None if none is."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def as_text(value: Any) -> str:
    """A value as text; 4 and 4.0 are both "4"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _entries(record: RecordOrTurns) -> Sequence[Any]:
    entries: Any = record
    if isinstance(record, Mapping):
        entries = first_given(record, *TURN_KEYS)
        if entries is None:
            raise LlavaError('the record has no "conversations"; give it a list of {"from", "value"} turns')
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        raise LlavaError(f'"conversations" has to be a list of turns, not {type(entries).__name__}')
    if not entries:
        raise LlavaError('"conversations" is empty; give at least a question and an answer')
    return entries


def _turn(entry: Any, number: int) -> tuple[int, str]:
    if not isinstance(entry, Mapping) or entry.keys().isdisjoint(_TEXT_KEYS):
        raise LlavaError(f'turn {number} of the conversation is not of the form {{"from": …, "value": …}}')
    speaker, value = first_given(entry, *_SPEAKER_KEYS), first_given(entry, *_TEXT_KEYS)
    if speaker is None:
        raise LlavaError(f'turn {number} of the conversation is not of the form {{"from": …, "value": …}}')
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise LlavaError(f"turn {number} of the conversation is from {speaker!r}; known: {', '.join(_ROLES)}")
    if value is None or isinstance(value, (list, Mapping)):
        raise LlavaError(f"turn {number} of the conversation has no text (value is {type(value).__name__})")
    return _ROLES[speaker], as_text(value)


def _unwrapped(image: Any, place: int) -> Any:
    """An object taken apart, also `{"bytes": null, "path": "x.png"}`, as the datasets library writes images that it
    left where they are."""
    if not isinstance(image, Mapping):
        return image
    try:
        return read_image_entry(image)
    except LlavaError as error:
        name = image["path"] if isinstance(image.get("path"), str) else "embedded"
        raise LlavaError(f"image {place} ({name:.200}): {error}") from error
