"""Answers that are JSON of a schema: which tokens may come next, by llguidance (extra "structured")."""

import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from llava.errors import LlavaError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPTIONS = {"whitespace_flexible": False}
"""No blanks between JSON's signs: a model that likes them could go on with blanks for ever."""
_LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "precompute_large_lexemes": False, "verbose_errors": False}
"""Of an answer's steps, beside the library's own: at most 3 KB a state, so 150 MB for an answer; 40 ms for the worst
step that was found. Nothing is computed for a whole vocabulary beforehand, so compiling takes the same for each."""
_MOST_KNOWN = 16
"""Schemas; each can hold as much memory as compiling it may take."""


class Constraint:
    """Where one answer stands in its grammar; used by one generation alone.

    Args:
        matcher: of its own.
        vocabulary: number of tokens.
        end: the token by which the grammar ends.
        ends: those by which the answer ends.
    """

    def __init__(self, matcher: Any, vocabulary: int, end: int, ends: tuple[int, ...]):
        self._matcher = matcher
        self._bits = np.zeros((1, -(-vocabulary // 32)), np.int32)
        self._vocabulary = vocabulary
        self._end, self._ends = end, list(ends)
        self._is_over = False

    def allowed(self) -> np.ndarray:
        """bool `[vocabulary]`: the tokens that may come next, an end mark once the JSON may be over."""
        from llguidance.numpy import fill_next_token_bitmask

        allowed = np.zeros(self._vocabulary, bool)
        if not self._is_over:
            fill_next_token_bitmask(self._matcher, self._bits)
            bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
            allowed = bits[: self._vocabulary].astype(bool)
            allowed[self._end] = False
            allowed[self._ends] = self._matcher.is_accepting()
        if not allowed.any():
            allowed[self._ends] = True
        return allowed

    def take(self, token: int) -> None:
        """`token` was chosen."""
        if token in self._ends:
            self._is_over = True
        else:
            self._matcher.consume_token(token)

    @property
    def error(self) -> LlavaError | None:
        """Why the grammar can't go on (it grew beyond the library's limits), if it can't."""
        if not self._matcher.is_error():
            return None
        return LlavaError(f"json_schema: {_one_line(self._matcher.get_error())}")


class Constraints:
    """Makes constraints for one tokenizer; may be used from any thread."""

    check: Callable[[str], None] | None = None
    """Is given a schema's JSON before it is compiled here, and raises if it must not be: compiling can take any time
    and memory. A server compiles it in a process that it can end first (`llava.serve.decoding.schemas`)."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocabulary: int):
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._known: dict[str, Any] = {}
        self._compiling: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()
        """Of the dictionaries; never held while anything is compiled."""
        self._for_library: Any = None
        self._making = threading.Lock()

    def of_schema(self, schema: dict[str, Any], stop_ids: Iterable[int]) -> Constraint:
        """A fresh constraint: JSON of `schema`, then one of `stop_ids`.

        Raises:
            LlavaError: llguidance isn't installed, or the schema isn't one that it understands; it says where.
        """
        require("llguidance", "structured")
        end = int(self._tokenizer.eos_token_id)
        matcher = self._matcher(json.dumps(schema))
        return Constraint(matcher.deep_copy(), self._vocabulary, end, tuple(sorted(stop_ids)) or (end,))

    def _matcher(self, schema: str) -> Any:
        """The schema's matcher; who asks while it is compiled waits for the same one."""
        while True:
            with self._lock:
                if schema in self._known:
                    return self._known[schema]
                work = self._compiling.get(schema)
                if work is None:
                    mine = self._compiling[schema] = Future()
                    break
            error = work.exception()
            if error is None:
                return work.result()
            if isinstance(error, LlavaError):
                raise LlavaError(str(error)) from None
            # Whoever compiled it was given up: the next one does.
        try:
            if self.check is not None:
                self.check(schema)
            matcher = compile_schema(self._library_tokenizer(), schema)
        except BaseException as failure:
            self._done(schema)
            mine.set_exception(failure)
            raise
        self._done(schema, matcher)
        mine.set_result(matcher)
        return matcher

    def _done(self, schema: str, matcher: Any = None) -> None:
        with self._lock:
            del self._compiling[schema]
            if matcher is not None:
                while len(self._known) >= _MOST_KNOWN:
                    del self._known[next(iter(self._known))]
                self._known[schema] = matcher

    def _library_tokenizer(self) -> Any:
        """One for all: each takes as much memory as the vocabulary, so none is made for a request's own ends."""
        import llguidance.hf

        with self._making:
            if self._for_library is None:
                self._for_library = llguidance.hf.from_tokenizer(
                    self._tokenizer,  # type: ignore[arg-type]
                    n_vocab=self._vocabulary,
                )
            return self._for_library


def compile_schema(tokenizer: Any, schema: str) -> Any:
    """llguidance's matcher of a schema (JSON) for its `tokenizer`. A schema can make it take any time and memory.

    Raises:
        LlavaError: the schema isn't one that the library understands.
    """
    import llguidance

    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)  # type: ignore[arg-type]
    except ValueError as error:
        raise LlavaError(f"json_schema: {_one_line(str(error))}") from None
    limits = llguidance.LLParserLimits(**_LIMITS)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise LlavaError(f"json_schema: {_one_line(matcher.get_error())}")
    return matcher


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
