"""What can be wrong with one training record, and which of it can be put right.

`check_form` looks at the record alone; `ImageCheck` opens its images; `LengthCheck` tokenises it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.conversion import is_inside
from llava.errors import LlavaError, amount
from llava.folders import in_other_form, is_file
from llava.image_options import with_options_of
from llava.record_content import (
    ASSISTANT,
    TURN_KEYS,
    USER,
    first_given,
    image_bytes,
    image_file,
    image_key,
    plain_entries,
    read_turns,
    record_images,
    with_entries,
)
from llava.records import Record

MISSPELT = "conversatons"

FAULTS = {
    "form": "not a conversation of alternating human and gpt turns",
    "first_turn": "the conversation doesn't begin with human",
    "no_answer": "the conversation ends with a question",
    "empty_answer": "an assistant turn without text",
    "image_count": "another number of <image> than of images",
    "image_in_answer": "<image> in an assistant turn",
    "image_options": "an image's option that is unknown or wrong, or two that exclude each other",
    "image_name": "an image's name that leads out of the image folder",
    "image_missing": "an image that isn't there",
    "image_other_form": "an image whose file has its name in another Unicode form (NFC, NFD); rename it",
    "image_unreadable": "an image that can't be opened",
    "template": "a conversation that the template can't take",
    "no_target": "nothing left to learn after truncation",
}
NOTES = {
    "misspelt_key": f'turns under "{MISSPELT}"',
    "other_names": 'turns not under "conversations", "from", "value", or speakers not called human and gpt',
    "number_as_text": "a turn whose text is a number",
    "empty_question": "a human turn without text",
    "text_only": "no image",
    "truncated": "longer than the model's maximum; its end is cut off",
    "duplicate_id": "an id that another record has too",
}
_USUAL_SPEAKERS = ("human", "gpt", "system")


class Finding(NamedTuple):
    """A fault or a note of one record."""

    kind: str
    detail: str = ""


def check_form(record: Record) -> list[Finding]:
    """Faults and notes that the record shows by itself; none for a good record with an image."""
    if _is_plainly_good(record):
        return []
    try:
        turns = read_turns(record)
    except LlavaError as error:
        return [Finding("form", str(error))]
    found = []
    try:
        images = len(record_images(record))
    except LlavaError as error:
        return [Finding("image_options", str(error))]
    placeholders = 0
    for role, text in turns:
        marks = text.count(DEFAULT_IMAGE_TOKEN)
        if role == USER:
            placeholders += marks
            if not text.strip():
                found.append(Finding("empty_question"))
        elif marks:
            found.append(Finding("image_in_answer"))
        elif not text.strip():
            found.append(Finding("empty_answer"))
    if turns[0].role != USER:
        found.append(Finding("first_turn"))
    if turns[-1].role != ASSISTANT:
        found.append(Finding("no_answer"))
    if placeholders != images:
        found.append(Finding("image_count", f"{placeholders} {DEFAULT_IMAGE_TOKEN}, {amount(images, 'image')}"))
    if not images:
        found.append(Finding("text_only"))
    return found + _spelling(record)


def _is_plainly_good(record: Record) -> bool:
    """Whether a record is in the usual form with no fault and no note: most records need no closer look."""
    entries = record.get("conversations")
    if type(entries) is not list or not entries or len(entries) % 2:
        return False
    marks = 0
    try:
        for place in range(0, len(entries), 2):
            question, answer = entries[place], entries[place + 1]
            text, reply = question["value"], answer["value"]
            if (
                question["from"] != "human"
                or answer["from"] != "gpt"
                or type(text) is not str
                or type(reply) is not str
            ):
                return False
            if DEFAULT_IMAGE_TOKEN in reply or not reply.strip() or not text.strip():
                return False
            marks += text.count(DEFAULT_IMAGE_TOKEN)
        images = record_images(record)
    except (TypeError, KeyError, LlavaError):
        return False
    return marks > 0 and marks == len(images)


def _spelling(record: Record) -> list[Finding]:
    found = []
    if record.get("conversations") is None and record.get(MISSPELT) is not None:
        found.append(Finding("misspelt_key"))
    entries = first_given(record, *TURN_KEYS)
    is_usual = all(entry.get("from") in _USUAL_SPEAKERS and entry.get("value") is not None for entry in entries)
    if not is_usual or entries is record.get("messages"):
        found.append(Finding("other_names"))
    if not all(isinstance(first_given(entry, "value", "content"), str) for entry in entries):
        found.append(Finding("number_as_text"))
    return found


def repair(record: Record, findings: Sequence[Finding]) -> Record | None:
    """A copy without its faults, or None if one of them can't be put right.

    Put right: the misspelt key, numbers, a question nobody answered at the end, and one missing `<image>`.
    """
    kinds = {finding.kind for finding in findings}
    if kinds & (FAULTS.keys() - {"no_answer", "image_count"}):
        return None
    given = {key: value for key, value in record.items() if value is not None}
    turns = plain_entries(record)
    if "no_answer" in kinds:
        turns = turns[:-1]
    no_mark = not any(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in turns)
    asked = next((turn for turn in turns if turn["from"] == "human"), None)
    if "image_count" in kinds and asked and no_mark and len(record_images(record)) == 1:
        asked["value"] += f"\n{DEFAULT_IMAGE_TOKEN}"
    fixed = with_entries(given, turns)
    still = {finding.kind for finding in check_form(fixed)} & FAULTS.keys()
    return None if still else fixed


class ImageCheck:
    """Opens each distinct image once (per process) and remembers what was wrong with it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: dict[str, Finding | None] = {}

    def __call__(self, record: Record) -> list[Finding]:
        try:
            found = [self._check(image) for image in record_images(record)]
        except LlavaError:
            return []  # its form is at fault
        return [finding for finding in found if finding is not None]

    def _check(self, image: Any) -> Finding | None:
        file = image_file(image)
        if isinstance(file, str) and not file.startswith("data:"):
            key = image_key(image)
            if key not in self._known:
                self._known[key] = self._check_file(image, file)
            return self._known[key]
        try:
            return _open(file if isinstance(file, str) else image_bytes(file), image, "embedded image")
        except LlavaError as error:
            return Finding("image_unreadable", str(error))

    def _check_file(self, image: Any, name: str) -> Finding | None:
        if not is_inside(name):
            return Finding("image_name", name)
        path = self._folder / name
        if is_file(path):
            return _open(path, image, name)
        return Finding("image_other_form" if in_other_form(path) else "image_missing", name)


def _open(source: Any, image: Any, name: str) -> Finding | None:
    """Open what `image` names, with the options that it has."""
    from llava.images import open_image

    try:
        open_image(with_options_of(image, source))
    except LlavaError as error:
        return Finding("image_unreadable", f"{name}: {error}")
    return None


class LengthCheck:
    """Tokenises records as training does: too long ones, and those with nothing left to learn.

    `lengths` holds the number of positions of each record seen, before truncation.
    """

    def __init__(self, tokenizer: Any, template: str, image_tokens: Any, max_length: int, features_per_image: int):
        self._tokenizer = tokenizer
        self._template = template
        self._image_tokens = image_tokens
        self._max_length = max_length
        self._features = features_per_image
        self.lengths: list[int] = []

    def __call__(self, record: Record) -> list[Finding]:
        from llava.tokenization import encode_conversation

        try:
            encoded = encode_conversation(
                record,
                self._template,
                self._tokenizer,
                self._image_tokens,
                max_length=self._max_length,
                features_per_image=self._features,
            )
        except LlavaError as error:
            return [Finding("template", str(error))]
        length = len(encoded.input_ids) + encoded.truncated
        self.lengths.append(length)
        found = []
        if encoded.truncated:
            found.append(Finding("truncated", f"{length} positions"))
        if not encoded.num_targets:
            found.append(Finding("no_target", f"{length} positions"))
        return found
