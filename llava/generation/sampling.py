"""Logits to tokens, each row by its own rule, whatever other rows are in the batch.

What each parameter of `SamplingParams` does is here, in `SamplingTable`: `_edited` changes logits (greedy rows too),
`_draw` cuts the distribution that is drawn from.
"""

import random
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import torch

from llava.generation.constraint import Constraint
from llava.generation.detokenize import Detokenizer
from llava.generation.types import TokenLogprob
from llava.sampling_params import SamplingParams

_LEAST_TOP_P = 1e-6  # the likeliest token alone
_AHEAD = 64
"""Random numbers of each row that are on the device at once."""


class TokenChooser:
    """How one answer's tokens are chosen: its rule, its own random numbers, and which tokens were there before.

    Args:
        prompt: ids of the prompt; those below zero (places of images) are no tokens.
        constraint: what the answer has to be a sentence of.
    """

    def __init__(self, rule: SamplingParams, prompt: Iterable[int] = (), constraint: Constraint | None = None):
        self.rule = rule
        self.constraint = constraint
        self.penalizes = rule.repetition_penalty != 1
        self.seen: set[int] | None = {int(token) for token in prompt if token >= 0} if self.penalizes else None
        """Tokens of prompt and answer, where the rule asks for them."""
        self.noted = 0
        """Tokens of the answer."""
        self._numbers: list[float] = []

    @cached_property
    def _random(self) -> random.Random:
        """Made when a token is first drawn: seeding one takes a tenth of a millisecond."""
        return random.Random(self.rule.seed)

    def numbers(self, count: int) -> list[float]:
        """The random numbers of the next `count` tokens: the answer's n-th token always gets the n-th one."""
        missing = self.noted + count - len(self._numbers)
        self._numbers += [self._random.random() for _ in range(missing)]
        return self._numbers[self.noted : self.noted + count]

    def note(self, token: int) -> None:
        """`token` now belongs to the answer."""
        self.noted += 1
        if self.seen is not None:
            self.seen.add(token)
        if self.constraint is not None:
            self.constraint.take(token)


class SamplingTable:
    """What the rows of a batch ask for, as tensors on the device; used step after step until the batch changes.

    A row's choice depends on its own logits, rule and random numbers alone.
    """

    def __init__(self, choosers: Sequence[TokenChooser], vocabulary: int, device: torch.device):
        self.choosers = list(choosers)
        self.vocabulary = vocabulary
        self.device = device
        rules = [chooser.rule for chooser in choosers]
        drawn = [row for row, rule in enumerate(rules) if not rule.is_greedy]
        self._drawn = self._column(drawn, torch.int64) if drawn else None
        """Rows that are drawn; the others take the likeliest token."""
        self._all_drawn = len(drawn) == len(rules)
        self._logprobs = [row for row, rule in enumerate(rules) if rule.logprobs is not None]
        self._edits(choosers)
        if drawn:
            own = [rules[row] for row in drawn]
            self._temperature = self._column([rule.temperature for rule in own])[:, None]
            self._top_p = self._column([max(rule.top_p, _LEAST_TOP_P) for rule in own])[:, None]
            self._top_k = self._column([rule.top_k or vocabulary for rule in own])[:, None]
            self._min_p = self._column([rule.min_p for rule in own])[:, None]
            self._ranks = torch.arange(vocabulary, device=device)
            self._drawing = [choosers[row] for row in drawn]
            self._refill()

    def is_of(self, choosers: Sequence[TokenChooser]) -> bool:
        """Whether it was made for these rows, in this order."""
        return self.choosers == choosers

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """One token for each row of `logits` `[rows, vocabulary]`, which stay as they are: int64 `[rows]`."""
        logits = self._edited(logits)
        if self._drawn is None:
            tokens = logits.argmax(-1)
        elif self._all_drawn:
            tokens = self._draw(logits.float())
        else:
            own = self._draw(logits.index_select(0, self._drawn).float())
            tokens = logits.argmax(-1).index_copy_(0, self._drawn, own)
        if self._seen is not None:
            self._seen.scatter_(1, tokens.index_select(0, self._penalized)[:, None], True)
        return tokens

    def logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, detokenizer: Detokenizer
    ) -> list[TokenLogprob | None]:
        """The log-probabilities that each row asks for of the `tokens` it got, None for rows that ask for none."""
        found: list[TokenLogprob | None] = [None] * len(self.choosers)
        if not self._logprobs:
            return found
        rows = self._column(self._logprobs, torch.int64)
        scores = torch.log_softmax(logits.index_select(0, rows).float(), -1)
        chosen = tokens.index_select(0, rows)[:, None]
        most = max(self.choosers[row].rule.logprobs or 0 for row in self._logprobs)
        values, ids = scores.topk(most, -1)
        # In float64 ids are exact, so that one copy brings all.
        parts = [chosen.double(), scores.gather(1, chosen).double(), ids.double(), values.double()]
        for row, (token, own, *top) in zip(self._logprobs, torch.cat(parts, 1).cpu().tolist(), strict=True):
            wanted = self.choosers[row].rule.logprobs
            likeliest = zip(map(int, top[:most]), top[most:], strict=True)
            listed = tuple((id, detokenizer.token(id), value) for id, value in list(likeliest)[:wanted])
            found[row] = TokenLogprob(int(token), detokenizer.token(int(token)), own, listed)
        return found

    def _edits(self, choosers: Sequence[TokenChooser]) -> None:
        """What changes logits: the penalty, biases and constraints."""
        self._seen = None
        penalized = [row for row, chooser in enumerate(choosers) if chooser.penalizes]
        if penalized:
            seen = np.zeros((len(penalized), self.vocabulary), bool)
            for own, row in zip(seen, penalized, strict=True):
                own[list(choosers[row].seen or ())] = True
            self._seen = torch.from_numpy(seen).to(self.device)
            self._penalized = self._column(penalized, torch.int64)
            self._penalty = self._column([choosers[row].rule.repetition_penalty for row in penalized])[:, None]
        biases = [
            (row, token, value)
            for row, one in enumerate(choosers)
            for token, value in (one.rule.logit_bias or {}).items()
        ]
        self._biased = None
        if biases:
            rows, columns, values = zip(*biases)
            self._biased = self._column(rows, torch.int64), self._column(columns, torch.int64), self._column(values)
        self._constrained = [row for row, chooser in enumerate(choosers) if chooser.constraint is not None]

    def _edited(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits that tokens are chosen from; without a penalty, a bias or a constraint the same tensor.

        The penalty is CTRL's (Keskar et al. 2019, section 4.1), over prompt and answer as in transformers and vLLM.
        """
        if self._seen is None and self._biased is None and not self._constrained:
            return logits
        logits = logits.float().clone()
        if self._seen is not None:
            own = logits.index_select(0, self._penalized)
            scaled = torch.where(own > 0, own / self._penalty, own * self._penalty)
            logits.index_copy_(0, self._penalized, torch.where(self._seen, scaled, own))
        if self._biased is not None:
            rows, columns, values = self._biased
            logits.index_put_((rows, columns), values, accumulate=True)
        if self._constrained:
            # A grammar is followed on the host; it has to know the last token.
            forbidden = np.zeros(tuple(logits.shape), bool)
            for row in self._constrained:
                constraint = self.choosers[row].constraint
                assert constraint is not None
                forbidden[row] = ~constraint.allowed()
            logits.masked_fill_(torch.from_numpy(forbidden).to(self.device), -torch.inf)
        return logits

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Inverse of the cumulative distribution at each row's random number, likeliest token first."""
        if self._step == _AHEAD:
            self._refill()
        numbers = self._numbers[:, self._step, None]
        self._step += 1
        sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = torch.softmax((sorted_logits - sorted_logits[:, :1]) / self._temperature, -1)
        before = probabilities.cumsum(-1) - probabilities
        # The first token that reaches top_p is still in; so at least one always is.
        kept = (before < self._top_p) & (self._ranks < self._top_k)
        kept &= probabilities >= self._min_p * probabilities[:, :1]
        cumulative = (probabilities * kept).double().cumsum(-1)
        place = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).clamp(max=self.vocabulary - 1)
        place = torch.minimum(place, kept.sum(-1, keepdim=True) - 1)
        return order.gather(-1, place)[:, 0]

    def _refill(self) -> None:
        """Bring the next random numbers of each drawn row to the device."""
        numbers = [chooser.numbers(_AHEAD) for chooser in self._drawing]
        self._numbers = torch.tensor(numbers, dtype=torch.float64).to(self.device)
        self._step = 0

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)
