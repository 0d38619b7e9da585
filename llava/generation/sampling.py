"""Logits to tokens, each row by its own rule, whatever other rows are in the batch.

What each parameter of `SamplingParams` does is here: `_edited` changes logits (greedy rows too), `_draw` cuts the
distribution that is drawn from.
"""

import random
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch

from llava.generation.constraint import Constraint
from llava.generation.detokenize import Detokenizer
from llava.generation.types import TokenLogprob
from llava.sampling_params import SamplingParams

_LEAST_TOP_P = 1e-6  # the likeliest token alone


class TokenChooser:
    """How one answer's tokens are chosen: its rule, its own random numbers, and which tokens were there before.

    Args:
        prompt: ids of the prompt; those below zero (places of images) are no tokens.
        constraint: what the answer has to be a sentence of.
    """

    def __init__(self, rule: SamplingParams, prompt: Iterable[int] = (), constraint: Constraint | None = None):
        self.rule = rule
        self.constraint = constraint
        penalizes = rule.repetition_penalty != 1
        self.seen: set[int] | None = {int(token) for token in prompt if token >= 0} if penalizes else None
        """Tokens of prompt and answer, where the rule asks for them."""
        self.edits = penalizes or bool(rule.logit_bias) or constraint is not None
        """Whether the logits are changed before a token is chosen."""

    @cached_property
    def random(self) -> random.Random:
        """Made when a token is first drawn: seeding one takes a tenth of a millisecond."""
        return random.Random(self.rule.seed)

    def note(self, token: int) -> None:
        """`token` now belongs to the answer."""
        if self.seen is not None:
            self.seen.add(token)
        if self.constraint is not None:
            self.constraint.take(token)


def choose_tokens(logits: torch.Tensor, choosers: Sequence[TokenChooser]) -> list[int]:
    """One token for each row of `logits` `[rows, vocabulary]`, which stay as they are.

    A row that is drawn takes one number from its own generator, so its choice depends on nothing else.
    """
    logits = _edited(logits, choosers)
    tokens = logits.argmax(-1)
    drawn = [row for row, chooser in enumerate(choosers) if not chooser.rule.is_greedy]
    if drawn:
        numbers = [choosers[row].random.random() for row in drawn]
        places = torch.tensor(drawn, device=logits.device)
        tokens[places] = _draw(logits[places].float(), [choosers[row].rule for row in drawn], numbers)
    return tokens.tolist()


def token_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], params: Sequence[SamplingParams], detokenizer: Detokenizer
) -> list[TokenLogprob | None]:
    """The log-probabilities that each row asks for, None for rows that ask for none."""
    wanted = [row for row, rule in enumerate(params) if rule.logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(params)
    if not wanted:
        return found
    scores = torch.log_softmax(logits[wanted].float(), -1)
    own = scores[torch.arange(len(wanted)), [tokens[row] for row in wanted]].tolist()
    most = max(params[row].logprobs or 0 for row in wanted)
    values, ids = (part.tolist() for part in scores.topk(most, -1))
    for place, row in enumerate(wanted):
        top = tuple(
            (token, detokenizer.token(token), value)
            for token, value in list(zip(ids[place], values[place], strict=True))[: params[row].logprobs]
        )
        found[row] = TokenLogprob(tokens[row], detokenizer.token(tokens[row]), own[place], top)
    return found


def _edited(logits: torch.Tensor, choosers: Sequence[TokenChooser]) -> torch.Tensor:
    """The logits that rows with a penalty, a bias or a constraint choose from; without such rows the same tensor.

    The penalty is CTRL's (Keskar et al. 2019, section 4.1), over prompt and answer as in transformers and vLLM.
    """
    rows = [row for row, chooser in enumerate(choosers) if chooser.edits]
    if not rows:
        return logits
    logits = logits.float().clone()
    for row in rows:
        chooser, own = choosers[row], logits[row]
        if chooser.seen:
            ids = torch.tensor(sorted(chooser.seen), device=logits.device)
            scores, penalty = own[ids], chooser.rule.repetition_penalty
            own[ids] = torch.where(scores > 0, scores / penalty, scores * penalty)
        if bias := chooser.rule.logit_bias:
            own[torch.tensor(list(bias), device=logits.device)] += torch.tensor(
                list(bias.values()), device=logits.device
            )
        if chooser.constraint is not None:
            own[~torch.from_numpy(chooser.constraint.allowed()).to(logits.device)] = -torch.inf
    return logits


def _draw(logits: torch.Tensor, rules: Sequence[SamplingParams], numbers: Sequence[float]) -> torch.Tensor:
    """Inverse of the cumulative distribution at `numbers` (each from 0 to 1), likeliest token first."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    vocabulary = logits.shape[-1]
    temperature = column([rule.temperature for rule in rules])
    top_p = column([max(rule.top_p, _LEAST_TOP_P) for rule in rules])
    top_k = column([rule.top_k or vocabulary for rule in rules])
    min_p = column([rule.min_p for rule in rules])
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax((sorted_logits - sorted_logits[:, :1]) / temperature, -1)
    before = probabilities.cumsum(-1) - probabilities
    # The first token that reaches top_p is still in; so at least one always is.
    kept = (before < top_p) & (torch.arange(vocabulary, device=logits.device) < top_k)
    kept &= probabilities >= min_p * probabilities[:, :1]
    cumulative = (probabilities * kept).double().cumsum(-1)
    target = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=vocabulary - 1)
    place = torch.minimum(place, kept.sum(-1, keepdim=True) - 1)
    return order.gather(-1, place)[:, 0]
