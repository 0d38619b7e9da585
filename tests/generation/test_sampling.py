"""Choosing tokens: the right distribution, the cuts, and no influence of neighbours."""

import random

import pytest
import torch

from llava.generation import SamplingParams
from llava.generation.sampling import choose_tokens

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -30.0])


def draw(count=4000, **settings):
    """Relative frequency of each token."""
    rule = SamplingParams(**settings)
    tokens = choose_tokens(LOGITS.expand(count, -1), [rule] * count, [random.Random(seed) for seed in range(count)])
    return torch.bincount(torch.tensor(tokens), minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(temperature):
    expected = torch.softmax(LOGITS / temperature, -1)
    assert (draw(temperature=temperature) - expected).abs().max() < 0.03


def test_top_p_keeps_the_fewest_that_reach_it():
    probabilities = torch.softmax(LOGITS, -1)
    kept = draw(temperature=1.0, top_p=float(probabilities[:2].sum()) - 0.01)
    assert kept[2:].sum() == 0
    assert kept[0] == pytest.approx(float(probabilities[0] / probabilities[:2].sum()), abs=0.03)
    assert draw(temperature=1.0, top_p=1e-6)[0] == 1


def test_top_k_and_greedy():
    assert draw(temperature=1.0, top_k=3)[3:].sum() == 0
    assert draw(temperature=1.0, top_k=1)[0] == 1
    assert draw()[0] == 1


def test_unlikely_tokens_never_come_by_rounding():
    assert draw(temperature=1.0)[5] == 0


def test_rows_have_their_own_rules_and_numbers():
    rules = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=3.0, top_p=0.9)]
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = choose_tokens(logits, rules, [None, random.Random(1), random.Random(2)])
    alone = [choose_tokens(logits[row : row + 1], [rules[row]], [random.Random(row)])[0] for row in range(3)]
    assert together == alone


def test_infinite_logits_and_tiny_temperatures():
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    rule = SamplingParams(temperature=1e-4)
    assert choose_tokens(logits, [rule], [random.Random(0)]) == [2]
