"""Ids to text while they come: no half characters, stop strings found, nothing shown that might still be taken back."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from llava.errors import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
"""What a tokenizer gives for a character whose last bytes are missing."""
_LONGEST_WAIT = 32
"""Tokens after which what has come is shown, broken characters too."""
_FEW, _REMEMBERED = 3, 1 << 16
"""Texts of up to `_FEW` tokens are cached; the cache holds `_REMEMBERED` of them."""
_BLANK = "▁"
"""As sentencepiece writes a blank."""
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = dict(
    zip(map(chr, [*_SHOWN, *range(0x100, 0x144)]), [*_SHOWN, *sorted({*range(256)} - {*_SHOWN})], strict=True)
)
"""GPT-2's signs for bytes: those that can be shown are themselves, the others the signs from U+0100 on."""


class Detokenizer:
    """Text of ids, special tokens left out. Ids that the tokenizer fails at, by a panic of its library too, are a
    LlavaError."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        vocabulary = tokenizer.get_vocab()
        self.byte_ids = frozenset(vocabulary[name] for name in names if name in vocabulary)
        """Ids that stand for single bytes: what a run of them means is known at its end."""
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._is_byte_level = not self.byte_ids and vocabulary.keys() >= _BYTES.keys()
        self._few = lru_cache(_REMEMBERED)(self._decode)

    def decode(self, token_ids: Sequence[int]) -> str:
        # A stream decodes the same pairs of tokens again and again, and each takes as long as a small model's layer.
        return self._few(*token_ids) if len(token_ids) <= _FEW else self._decode(*token_ids)

    def _decode(self, *token_ids: int) -> str:
        return self._text_of(list(token_ids), skip_special_tokens=True) if token_ids else ""

    def token(self, token_id: int) -> str:
        """A single token's text, special ones and the blank that it begins with included."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What a single token adds to a text in UTF-8, which may be a part of a character."""
        with library_errors("the checkpoint's tokenizer fails at these tokens"):
            piece = cast(str | None, self._tokenizer.convert_ids_to_tokens(token_id)) or ""
        if token_id in self.byte_ids:
            return bytes([int(piece[3:5], 16)])
        if token_id not in self._added:
            if self._is_byte_level and _BYTES.keys() >= set(piece):
                return bytes(_BYTES[sign] for sign in piece)
            if _BLANK in piece:
                return piece.replace(_BLANK, " ").encode()
        return self._text_of([token_id]).encode()

    def _text_of(self, token_ids: list[int], **options: bool) -> str:
        with library_errors("the checkpoint's tokenizer fails at these tokens"):
            return cast(str, self._tokenizer.decode(token_ids, **options))


class TextStream:
    """The text of one answer, token by token.

    `push` returns text that is final: joined, the pieces (with `flush`'s) are the answer without outer blanks,
    up to the first stop string. Where it goes on with a text, outer blanks are its own and stay.

    Args:
        before: ids of the text that the answer goes on with; None for an answer that stands by itself.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), before: Sequence[int] | None = None):
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._keeps_blanks = before is not None
        self._ids: list[int] = self._last_character(before or ())
        self._from = 0
        """The text of ids before this one is settled; they are decoded once more as context only."""
        self._read = len(self._ids)
        """Ids before this one are in `_text`."""
        self._text = ""
        self._shown = 0
        self.is_stopped = False

    @property
    def text(self) -> str:
        text = self._text[: self._shown]
        return text if self._keeps_blanks else text.strip()

    def push(self, token_ids: Sequence[int]) -> str:
        if self.is_stopped:
            return ""
        self._ids.extend(token for token in token_ids if token not in self._detokenizer.special_ids)
        if self._read == len(self._ids):
            return ""
        is_waiting = len(self._ids) - self._read < _LONGEST_WAIT
        if is_waiting and self._ids[-1] in self._detokenizer.byte_ids:
            return ""
        end = len(self._ids) if is_waiting else self._last_whole()
        known, fresh = self._decode(self._from, self._read), self._decode(self._from, end)
        if is_waiting and fresh.endswith(_UNFINISHED):
            return ""
        self._append(fresh[len(known) :])
        self._from, self._read = self._read, end
        return self._show(len(self._text) - self._held_back())

    def flush(self) -> str:
        """What was held back, once no token will follow."""
        if not self.is_stopped and self._read < len(self._ids):
            known, fresh = self._decode(self._from, self._read), self._decode(self._from, len(self._ids))
            self._append(fresh[len(known) :])
        return self._show(len(self._trimmed(self._text)))

    def _last_character(self, ids: Sequence[int]) -> list[int]:
        """The last of `ids`, as many as make a character: a text's first token may lose the blank it begins with."""
        for count in range(1, min(4, len(ids)) + 1):
            last = list(ids[-count:])
            if min(last) < 0 or not self._detokenizer.special_ids.isdisjoint(last):
                break
            if _UNFINISHED not in self._detokenizer.decode(last):
                return last
        return []

    def _trimmed(self, text: str) -> str:
        """Without blanks that may be the last."""
        return text if self._keeps_blanks else text.rstrip()

    def _last_whole(self) -> int:
        """Where the last whole character ends, if it does within the last tokens; one has four bytes at most."""
        known = len(self._decode(self._from, self._read))
        for end in range(len(self._ids), max(self._read, len(self._ids) - 4), -1):
            if _UNFINISHED not in self._decode(self._from, end)[known:]:
                return end
        return len(self._ids)

    def _decode(self, start: int, end: int) -> str:
        return self._detokenizer.decode(self._ids[start:end])

    def _append(self, fresh: str) -> None:
        start = max(0, len(self._text) - max(map(len, self._stop), default=0))
        self._text += fresh
        places = [place for stop in self._stop if (place := self._text.find(stop, start)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.is_stopped = True

    def _held_back(self) -> int:
        """Characters at the end that may belong to a stop string, or are blanks that may be the last."""
        text = self._text
        held = len(text) - len(self._trimmed(text))
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:length]):
                    kept = text[:-length]
                    held = max(held, len(text) - len(self._trimmed(kept)))
                    break
        return held

    def _show(self, end: int) -> str:
        if not self._keeps_blanks and not self._text[:end].strip():
            return ""
        start = self._shown or (0 if self._keeps_blanks else len(self._text) - len(self._text.lstrip()))
        self._shown = max(end, self._shown)
        return self._text[start : self._shown]
