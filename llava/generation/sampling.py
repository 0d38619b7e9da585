"""Logits to tokens, each row by its own rule, the same whatever rows stand beside it."""

import random
from collections.abc import Sequence

import torch

from llava.generation.detokenize import Detokenizer
from llava.generation.types import SamplingParams, TokenLogprob


def choose_tokens(
    logits: torch.Tensor, params: Sequence[SamplingParams], generators: Sequence[random.Random | None]
) -> list[int]:
    """One token for each row of `logits` `[rows, vocabulary]`.

    A row that is sampled takes one number from its own generator, so its choice depends on nothing else.
    """
    tokens = logits.argmax(-1)
    sampled = [row for row, rule in enumerate(params) if not rule.is_greedy]
    if sampled:
        rules = [params[row] for row in sampled]
        numbers = [generators[row].random() for row in sampled]
        places = torch.tensor(sampled, device=logits.device)
        tokens[places] = _sample(logits[places].float(), rules, numbers)
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


def _sample(logits: torch.Tensor, rules: Sequence[SamplingParams], numbers: Sequence[float]) -> torch.Tensor:
    """Inverse of the cumulative distribution at `numbers` (each from 0 to 1), likeliest token first."""
    device = logits.device
    temperature = torch.tensor([rule.temperature for rule in rules], device=device)[:, None]
    top_p = torch.tensor([rule.top_p for rule in rules], device=device)[:, None]
    vocabulary = logits.shape[-1]
    top_k = torch.tensor([rule.top_k or vocabulary for rule in rules], device=device)[:, None]
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax((sorted_logits - sorted_logits[:, :1]) / temperature, -1)
    before = probabilities.cumsum(-1) - probabilities
    # The first token that reaches top_p is still in; so at least one always is.
    kept = (before < top_p) & (torch.arange(vocabulary, device=device) < top_k)
    cumulative = (probabilities * kept).double().cumsum(-1)
    target = torch.tensor(numbers, dtype=torch.float64, device=device)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=vocabulary - 1)
    place = torch.minimum(place, kept.sum(-1, keepdim=True) - 1)
    return order.gather(-1, place)[:, 0]
