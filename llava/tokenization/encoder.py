"""Text in segments → ids in segments, such that the ids of a beginning never depend on what follows.

Labels need to know which ids belong to an answer, and a prompt's ids must be the beginning of the training
sample's. Counting the ids of pieces that were tokenised apart goes wrong wherever a tokenizer joins text across
a border. Here every segment is tokenised together with the text before it, and accepted only if the ids of that
text come out unchanged; where they don't, the segment is tokenised by itself. So both properties hold for every
tokenizer, and the ids equal those of the text in one piece wherever the borders allow it.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers.pre_tokenizers import Metaspace

from llava.constants import DEFAULT_IMAGE_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX, SCHEME_PATCH
from llava.records import sound_text
from llava.tokenization.image_tokens import ImageTokens


def tokenize_prompt(prompt: str, tokenizer: Any, image_tokens: ImageTokens | None = None) -> list[int]:
    """Ids of a rendered prompt, the tokenizer's BOS in front, one IMAGE_TOKEN_INDEX per `<image>`."""
    return encode_segments([prompt], tokenizer, image_tokens or ImageTokens())[0]


def encode_segments(segments: Sequence[str], tokenizer: Any, image_tokens: ImageTokens) -> list[list[int]]:
    """The ids of each segment of one text, the tokenizer's BOS in front of the first.

    The ids of the first n segments are the same whatever follows them. Half of a character pair, which no
    tokenizer takes, becomes U+FFFD (records are mended as they are read; a request may hold one too).
    """
    encoder = _Encoder(tokenizer)
    encode = _encode_patches if image_tokens.scheme == SCHEME_PATCH else _encode_placeholders
    encoded = [encode(encoder, sound_text(segment).split(DEFAULT_IMAGE_TOKEN), image_tokens) for segment in segments]
    if encoded:
        encoded[0] = encoder.begin_ids() + encoded[0]
    return encoded


def _encode_placeholders(encoder: "_Encoder", parts: list[str], image_tokens: ImageTokens) -> list[int]:
    """Each stretch between two images as a text of its own, as LLaVA tokenises it."""
    before, after = image_tokens.text.split(DEFAULT_IMAGE_TOKEN)
    ids: list[int] = []
    for number, part in enumerate(parts):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            encoder.begin_text()
            part = after + part
        if number < len(parts) - 1:
            part += before
        ids += encoder.go_on(part)
    return ids


def _encode_patches(encoder: "_Encoder", parts: list[str], image_tokens: ImageTokens) -> list[int]:
    """All in one, as v1.0 tokenises it; an `<im_patch>` that somebody typed keeps its own id and is no image."""
    ids = encoder.go_on(image_tokens.text.join(parts))
    is_image: list[bool] = []
    for number, part in enumerate(parts):
        is_image += [True] * bool(number) + [False] * part.count(DEFAULT_IMAGE_PATCH_TOKEN)
    patch_id = encoder.tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_PATCH_TOKEN)
    places = [place for place, token in enumerate(ids) if token == patch_id]
    for place, image in zip(places, is_image, strict=True):
        if image:
            ids[place] = IMAGE_TOKEN_INDEX
    return ids


class _Encoder:
    """Tokenises a text that arrives in pieces.

    `_open` is the stretch of text that the next piece is tokenised together with, `_open_ids` its ids. The ids of
    `_anchor`, with which it may begin, were given out before, or belong to no text at all.
    """

    _ANCHORS = ("\n", ":", ".", "a")

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._special = _special_tokens(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        pre_tokenizer = getattr(backend, "pre_tokenizer", None)
        self._blank_is_kept = isinstance(pre_tokenizer, Metaspace) and pre_tokenizer.prepend_scheme == "first"
        self.begin_text()

    def begin_ids(self) -> list[int]:
        """What the tokenizer puts in front of a text: BOS, or nothing."""
        ids = self.tokenizer("", verbose=False)["input_ids"]
        return ids[:1] if ids and ids[0] == self.tokenizer.bos_token_id else []

    def begin_text(self) -> None:
        """What comes is the beginning of a text (and gets LLaMA's blank)."""
        self._open = ""
        self._open_ids: list[int] = []

    def go_on(self, piece: str) -> list[int]:
        """The ids of `piece`, which follows what came before."""
        if not piece:
            return []
        known, together = self._open_ids, self._ids(self._open + piece)
        if together[: len(known)] == known:
            self._open, self._open_ids = self._open + piece, together
        else:
            anchor, known, self._open_ids = self._by_itself(piece)
            self._open = anchor + piece
        ids = self._open_ids[len(known) :]
        self._close_behind_special()
        return ids

    def _by_itself(self, piece: str) -> tuple[str, list[int], list[int]]:
        """(anchor, its ids, the ids of anchor and piece, which begin with the anchor's)."""
        for anchor in self._ANCHORS:
            head, ids = self._ids(anchor), self._ids(anchor + piece)
            if ids[: len(head)] == head:
                return anchor, head, ids
        return "", [], self._ids(piece)

    def _close_behind_special(self) -> None:
        """No tokenizer joins text across a special token: what is before it needn't be tokenised again."""
        token = self._special.get(self._open_ids[-1]) if self._open_ids else None
        if token and self._open.endswith(token):
            self._open, self._open_ids = token, self._open_ids[-1:]

    def _ids(self, text: str) -> list[int]:
        if self._blank_is_kept and text.startswith(" "):
            # The reference's tokenizer puts its blank in front of any text; this scheme leaves it out here.
            text = " " + text
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


_ADDED: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()
"""A tokenizer's added tokens, by id: each time that they are asked for it makes them all anew. One that is added later
isn't among them, so what is before it is tokenised again, to the same ids."""


def _special_tokens(tokenizer: Any) -> Mapping[int, str]:
    added = _ADDED.get(tokenizer)
    if added is None:
        tokens = getattr(tokenizer, "added_tokens_decoder", {})
        added = _ADDED[tokenizer] = {index: str(token) for index, token in tokens.items()}
    special = {tokenizer.convert_tokens_to_ids(token): token for token in tokenizer.all_special_tokens}
    return ChainMap(special, added)
