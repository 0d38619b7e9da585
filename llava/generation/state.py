"""One answer under way: its tokens and text so far, and whom to tell about them."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llava.errors import LlavaError
from llava.generation.cache.prefix_store import Prefix
from llava.generation.detokenize import Detokenizer, TextStream
from llava.generation.prompts import Prompt
from llava.generation.sampling import TokenChooser
from llava.generation.types import Answer, Piece, TokenLogprob
from llava.sampling_params import SamplingParams

log = logging.getLogger(__name__)

Listener = Callable[[Piece | Answer], None]
"""Is given each piece as it is made and the answer at the end, in the thread that runs the engine."""


class Generation:
    """A request on its way: what was generated so far, and whom to tell."""

    def __init__(self, prompt: Prompt, detokenizer: Detokenizer, listener: Listener, is_streamed: bool, keep: bool):
        self.prompt = prompt
        self._detokenizer = detokenizer
        self.sampling: SamplingParams = prompt.request.sampling
        self.listener: Listener | None = listener
        self.keep = keep
        """Whether keys and values stay for the next turn of the same conversation."""
        self.is_streamed = is_streamed
        self.prompt_tokens = len(prompt)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if self.sampling.logprobs is None else []
        self.length = 0
        """Positions in the cache."""
        self.cached = 0
        self.chooser = TokenChooser(self.sampling, prompt.ids, prompt.constraint)
        before = prompt.ids[-4:].tolist() if prompt.request.is_continued else None
        follows_text = is_streamed or prompt.stop_strings or before is not None
        self.text = TextStream(detokenizer, prompt.stop_strings, before) if follows_text else None
        self._told = 0
        self._in_prompt = 0
        """How many tokens became part of the prompt, because the row was given up for a while."""

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.prompt.max_new_tokens - len(self.tokens)

    def key(self) -> np.ndarray:
        """What the cache's row stands for: prompt and tokens, as far as they were read."""
        own = np.array(self.tokens[self._in_prompt :], np.int64)
        return np.concatenate([self.prompt.key, own])[: self.length]

    def continue_later(self) -> None:
        """Give up the row: the tokens so far go to the prompt, which is computed again."""
        own = np.array(self.tokens[self._in_prompt :], np.int64)
        ids, key = (np.concatenate([part, own]) for part in (self.prompt.ids, self.prompt.key))
        self.prompt = replace(self.prompt, ids=ids, key=key)
        self._in_prompt, self.length = len(self.tokens), 0

    def take(self, token: int, logprob: TokenLogprob | None = None) -> str | None:
        """Add a token; the reason if the answer ends with it."""
        if token in self.prompt.stop_ids:
            return "stop"
        self.tokens.append(token)
        self.chooser.note(token)
        if logprob is not None and self.logprobs is not None:
            self.logprobs.append(logprob)
        if self.text is not None:
            self._tell(self.text.push([token]))
            if self.text.is_stopped:
                return "stop"
        return "length" if self.left <= 0 else None

    def finish(self, reason: str, error: LlavaError | None = None) -> None:
        if error is None and self.prompt.constraint is not None:
            error = self.prompt.constraint.error
        try:
            text = self._whole_text()
        except LlavaError as failure:
            text, error = "", error or failure
        self._say(
            Answer(
                text,
                self.tokens,
                reason,
                self.prompt.request.id,
                prompt_tokens=self.prompt_tokens,
                cached_tokens=self.cached,
                logprobs=self.logprobs,
                error=error,
            )
        )

    def _whole_text(self) -> str:
        if self.text is None:
            return self._detokenizer.decode(self.tokens).strip()
        self._tell(self.text.flush(), is_last=True)
        return self.text.text

    def _tell(self, text: str, is_last: bool = False) -> None:
        if self.is_streamed and (text or (is_last and self._told < len(self.tokens))):
            start, self._told = self._told, len(self.tokens)
            self._say(Piece(text, self.tokens[start:], None if self.logprobs is None else self.logprobs[start:]))

    def _say(self, news: Piece | Answer) -> None:
        """Tell the listener. One that fails is told no more: the step goes on for the others."""
        if self.listener is None:
            return
        try:
            self.listener(news)
        except Exception:
            log.exception("the listener of request %r failed and is told no more", self.prompt.request.id)
            self.listener = None


class Plan:
    """What is computed of one prompt: positions from `begin` on.

    Those before come from `prefix` (kept since an earlier step) or from `source` (another prompt of this step, which
    computes them); at most one of the two is there.
    """

    def __init__(self, generation: Generation, prefix: Prefix | None, begin: int):
        self.generation = generation
        self.prompt = generation.prompt
        self.begin = begin
        self.prefix = prefix
        self.source: Plan | None = None
        self.kept_length = 0
        """How many of the first positions are kept for requests that are still to come."""

    @property
    def depth(self) -> int:
        """How many sources lie behind each other: 0 without one."""
        return 0 if self.source is None else self.source.depth + 1
