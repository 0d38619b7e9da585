"""A record's conversation as turns that alternate between user and assistant, or an error that says why not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava.errors import LlavaError

USER, ASSISTANT = 0, 1
_ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT}
_KEYS = ("conversations", "conversatons")
"""Where a record keeps its turns; some files of the LLaVA-Med release have the second spelling."""


class Turn(NamedTuple):
    role: int
    """USER or ASSISTANT."""
    text: str


def read_turns(record: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The turns of a record (or of its list of `{"from", "value"}`), beginning with whoever comes first.

    Numbers are taken as text.

    Raises:
        LlavaError: no conversation, a turn that isn't one, an unknown speaker, the same speaker twice in a row.
            The message doesn't name the record; the caller knows where it is from.
    """
    turns: list[Turn] = []
    for number, entry in enumerate(_entries(record), 1):
        turn = _turn(entry, number)
        if turns and turns[-1].role == turn.role:
            raise LlavaError(
                f"turns {number - 1} and {number} of the conversation are both from {entry['from']!r}; "
                f"human and gpt have to alternate"
            )
        turns.append(turn)
    return turns


def _entries(record: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    entries: Any = record
    if isinstance(record, Mapping):
        key = next((key for key in _KEYS if record.get(key) is not None), None)
        if key is None:
            raise LlavaError('the record has no "conversations"; give it a list of {"from", "value"} turns')
        entries = record[key]
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        raise LlavaError(f'"conversations" has to be a list of turns, not {type(entries).__name__}')
    if not entries:
        raise LlavaError('"conversations" is empty; give at least a question and an answer')
    return entries


def _turn(entry: Any, number: int) -> Turn:
    if not isinstance(entry, Mapping) or "from" not in entry or "value" not in entry:
        raise LlavaError(f'turn {number} of the conversation is not of the form {{"from": …, "value": …}}')
    if entry["from"] not in _ROLES:
        raise LlavaError(f"turn {number} of the conversation is from {entry['from']!r}; known: {', '.join(_ROLES)}")
    value = entry["value"]
    if value is None or isinstance(value, (list, Mapping)):
        raise LlavaError(f"turn {number} of the conversation has no text (value is {type(value).__name__})")
    return Turn(_ROLES[entry["from"]], str(value))
