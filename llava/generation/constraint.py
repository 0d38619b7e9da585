"""Answers that are JSON of a schema: which tokens may come next, by llguidance (extra "structured")."""

import json
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava.errors import LlavaError, require

_OPTIONS = {"whitespace_flexible": False}
"""No blanks between JSON's signs: a model that likes them could go on with blanks for ever."""
_MOST_KNOWN = 64


class Constraint:
    """Where one answer stands in its grammar; used by one generation alone."""

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher = matcher
        self._bits = np.zeros((1, -(-vocabulary // 32)), np.int32)
        self._vocabulary = vocabulary

    def allowed(self) -> np.ndarray:
        """bool `[vocabulary]`: the tokens that may come next, an end mark once the JSON may be over."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._vocabulary].astype(bool)

    def take(self, token: int) -> None:
        """`token` was chosen."""
        self._matcher.consume_token(token)

    @property
    def error(self) -> LlavaError | None:
        """Why the grammar can't go on (it grew beyond the library's limits), if it can't."""
        if not self._matcher.is_error():
            return None
        return LlavaError(f"json_schema: {_one_line(self._matcher.get_error())}")


class Constraints:
    """Makes constraints for one tokenizer; may be used from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int):
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._tokenizers: dict[tuple[int, ...], Any] = {}
        self._known: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._lock = threading.Lock()

    def of_schema(self, schema: dict[str, Any], stop_ids: Iterable[int]) -> Constraint:
        """A fresh constraint: JSON of `schema`, then one of `stop_ids`.

        Raises:
            LlavaError: llguidance isn't installed, or the schema isn't one that it understands; it says where.
        """
        require("llguidance", "structured")
        text, ends = json.dumps(schema), tuple(sorted(stop_ids)) or (int(self._tokenizer.eos_token_id),)
        with self._lock:
            matcher = self._known.get((text, ends))
            if matcher is None:
                matcher = self._matcher(text, ends)
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known[text, ends] = matcher
            return Constraint(matcher.deep_copy(), self._vocabulary)

    def _matcher(self, schema: str, ends: tuple[int, ...]) -> Any:
        import llguidance
        import llguidance.hf

        if ends not in self._tokenizers:
            self._tokenizers[ends] = llguidance.hf.from_tokenizer(
                self._tokenizer,  # type: ignore[arg-type]
                n_vocab=self._vocabulary,
                eos_token=list(ends),
            )
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)  # type: ignore[arg-type]
        except ValueError as error:
            raise LlavaError(f"json_schema: {_one_line(str(error))}") from None
        matcher = llguidance.LLMatcher(self._tokenizers[ends], grammar, log_level=0)
        if matcher.is_error():
            raise LlavaError(f"json_schema: {_one_line(matcher.get_error())}")
        return matcher


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
