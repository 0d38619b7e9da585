"""A request made ready for the model: ids, the images in them, and what ends the answer. No model is run here."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.errors import LlavaError, amount
from llava.generation.cache.prefix_store import BLOCK
from llava.generation.cache.tokenizer_cache import TokenizerCache
from llava.generation.constraint import Constraint, Constraints
from llava.generation.image_features import ImageEncoder, RequestImage
from llava.generation.types import ContextTooLong, Request, name_request
from llava.model.configuration import LlavaConfigFields
from llava.tokenization import ImageTokens, encode_prompt, expand_images, stop_token_ids, tokenize_prompt


class Beginning(NamedTuple):
    """The first `length` positions of a prompt; equal digests are equal beginnings."""

    length: int
    digest: bytes


@dataclass(eq=False)
class Prompt:
    """`ids` int64 `[positions]` hold IMAGE_TOKEN_INDEX at each position of an image."""

    request: Request
    ids: np.ndarray
    key: np.ndarray
    """`ids` with each image's own number in place of IMAGE_TOKEN_INDEX: alike only if the content is."""
    images: list[RequestImage]
    spans: list[tuple[int, int]]
    """Where each image begins and ends."""
    beginnings: list[Beginning | None]
    """What other prompts may have in common with this one: the text before the first image, all up to the last
    image's end, all but the last position. None where too short to be worth it."""
    max_new_tokens: int
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    constraint: Constraint | None = None

    def __len__(self) -> int:
        return len(self.ids)


class PromptBuilder:
    """Makes prompts of requests for one model; may be used from any thread."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: LlavaConfigFields, encoder: ImageEncoder, context_len: int
    ):
        self.tokenizer = TokenizerCache(tokenizer)
        self.encoder = encoder
        self.context_len = context_len
        self.image_tokens = ImageTokens.from_config(config, tokenizer)
        self.constraints = Constraints(tokenizer, config.vocab_size)
        self._special = set(tokenizer.all_special_tokens)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self._ends = frozenset(ends) & frozenset(tokenizer.all_special_ids)
        """Ids that the model's configuration names as ends, of a turn too; a default that fits no token isn't one."""
        self._stop_ids: dict[str, frozenset[int]] = {}
        self._vocabulary = config.vocab_size
        self._longest_text = context_len * max(map(len, tokenizer.get_vocab()))
        """Characters that the context can hold, if each token were the vocabulary's longest."""

    def build(self, request: Request, known: dict[int, RequestImage] | None = None) -> Prompt:
        """The request's prompt; images are identified, not yet opened (but for `anyres`).

        `known` collects images by the identity of their source, so that a source used again isn't hashed again.

        Raises:
            LlavaError: images and `<image>` differ in number, an image's file is missing, the prompt is empty, an id of
                it or of the sampling parameters isn't in the vocabulary, a schema isn't understood.
            ContextTooLong: no room for an answer; the message names both lengths.
        """
        try:
            return self._built(request, {} if known is None else known)
        except LlavaError as error:
            name_request(error, request.id)
            raise

    def _built(self, request: Request, known: dict[int, RequestImage]) -> Prompt:
        self._check(request)
        ids = np.asarray(self._tokenize(request.conversation), np.int64)
        self._check_ids(ids)
        places = int((ids == IMAGE_TOKEN_INDEX).sum())
        if places != len(request.images):
            raise LlavaError(
                f"the text has {places} <image> for {amount(len(request.images), 'image')}; "
                f"each image needs its <image> in the text"
            )
        images = [self._identify(source, known) for source in request.images]
        lengths = [self.encoder.num_positions(image) for image in images]
        ids, _ = expand_images(ids, None, lengths)
        left = self.context_len - len(ids)
        if left < 1:
            raise ContextTooLong(
                f"the prompt takes {len(ids)} positions and the model's context is "
                f"{self.context_len}; shorten the conversation or give fewer images"
            )
        where = np.flatnonzero(ids == IMAGE_TOKEN_INDEX)
        key = ids.copy()
        key[where] = np.repeat(np.array([image.key for image in images], np.int64), lengths)
        starts = where[np.cumsum([0, *lengths])[:-1]].tolist() if lengths else []
        spans = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        ends = (spans[0][0], spans[-1][1]) if spans else (0, 0)
        stop_ids, stop_strings = self._stops(request)
        schema = request.sampling.json_schema
        return Prompt(
            request,
            ids,
            key,
            images,
            spans,
            beginnings=[_beginning(key, end) for end in (*ends, len(ids) - 1)],
            max_new_tokens=min(request.sampling.max_new_tokens, left),
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            constraint=None if schema is None else self.constraints.of_schema(schema, stop_ids),
        )

    def _check(self, request: Request) -> None:
        """What can be refused before anything is tokenised, which for 30 MB of text takes minutes."""
        conversation = request.conversation
        texts = [conversation] if isinstance(conversation, str) else []
        if isinstance(conversation, Conversation):
            texts = [conversation.system, *(text for _, text in conversation.messages if text)]
        length = sum(map(len, texts))
        if length > self._longest_text:
            raise ContextTooLong(
                f"the text has {length} characters, more than the model's context of "
                f"{self.context_len} can hold; shorten the conversation"
            )
        for name in ("stop_token_ids", "logit_bias"):
            unknown = max(getattr(request.sampling, name), default=0)
            if unknown >= self._vocabulary:
                raise LlavaError(f"{name}: {unknown} is no id of the model's vocabulary of {self._vocabulary}")

    def _check_ids(self, ids: np.ndarray) -> None:
        """What no embedding is there for would end the answers of all who are in a step with it."""
        if not len(ids):
            raise LlavaError("the prompt is empty; ask something")
        unknown = ids[(ids != IMAGE_TOKEN_INDEX) & ((ids < 0) | (ids >= self._vocabulary))]
        if len(unknown):
            raise LlavaError(
                f"the prompt has the id {unknown[0]}, which isn't in the model's vocabulary of "
                f"{self._vocabulary}; leave that token out"
            )

    def _tokenize(self, conversation: Conversation | str | Sequence[int]) -> Sequence[int]:
        if isinstance(conversation, Conversation):
            return encode_prompt(conversation, self.tokenizer, self.image_tokens)
        if isinstance(conversation, str):
            return tokenize_prompt(conversation, self.tokenizer, self.image_tokens)
        return conversation

    def _identify(self, source: Any, known: dict[int, RequestImage]) -> RequestImage:
        image = known.get(id(source))
        if image is None:
            image = known[id(source)] = self.encoder.identify(source)
        return image

    def _stops(self, request: Request) -> tuple[frozenset[int], tuple[str, ...]]:
        """(ids, texts) that end the answer: the request's own, the template's and the model's."""
        strings = list(request.sampling.stop)
        own = frozenset(request.sampling.stop_token_ids)
        if request.sampling.ignore_eos:
            return own, tuple(strings)
        template = request.conversation if isinstance(request.conversation, Conversation) else None
        end = template.stop_str if template else ""
        if end not in self._stop_ids:
            ids = stop_token_ids(template, self.tokenizer) if template and end else [self.tokenizer.eos_token_id]
            self._stop_ids[end] = (frozenset(ids) | self._ends) - {None}
        if end and end not in self._special:
            strings.append(end)
        return self._stop_ids[end] | own, tuple(dict.fromkeys(strings))


def _beginning(key: np.ndarray, length: int) -> Beginning | None:
    if not BLOCK <= length < len(key):
        return None
    return Beginning(length, hashlib.blake2b(key[:length].tobytes(), digest_size=16).digest())
