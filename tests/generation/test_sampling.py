"""Choosing tokens: the right distribution, the cuts, and no influence of neighbours."""

import pytest
import torch

from llava.generation import SamplingParams
from llava.generation.sampling import SamplingTable, TokenChooser

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -30.0])


def choose_tokens(logits, choosers) -> list[int]:
    return SamplingTable(choosers, logits.shape[-1], logits.device).choose(logits).tolist()


def draw(count=4000, **settings):
    """Relative frequency of each token."""
    choosers = [TokenChooser(SamplingParams(seed=seed, **settings)) for seed in range(count)]
    tokens = choose_tokens(LOGITS.expand(count, -1), choosers)
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
    assert draw(temperature=1.0, top_p=1e-6)[0] == draw(temperature=1.0, top_p=0)[0] == 1


def test_top_k_and_greedy():
    assert draw(temperature=1.0, top_k=3)[3:].sum() == 0
    assert draw(temperature=1.0, top_k=1)[0] == 1
    assert draw()[0] == 1


def test_min_p_cuts_below_a_part_of_the_likeliest():
    ratios = torch.softmax(LOGITS, -1) / torch.softmax(LOGITS, -1)[0]
    kept = draw(temperature=1.0, min_p=float(ratios[2]) - 0.01)
    assert kept[3:].sum() == 0 and (kept[:3] > 0).all()
    assert draw(temperature=1.0, min_p=1)[0] == 1


def test_unlikely_tokens_never_come_by_rounding():
    assert draw(temperature=1.0)[5] == 0


def test_rows_have_their_own_rules_and_numbers():
    rules = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=3.0, top_p=0.9, seed=2),
        SamplingParams(temperature=1.0, repetition_penalty=1.5, seed=3),
        SamplingParams(logit_bias={7: 50}),
    ]
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    before = logits.clone()

    def choosers():
        return [TokenChooser(rule, [3, -200, 4]) for rule in rules]

    together = choose_tokens(logits, choosers())
    alone = [choose_tokens(logits[row : row + 1], [chooser])[0] for row, chooser in enumerate(choosers())]
    assert together == alone and together[4] == 7
    assert torch.equal(logits, before), "log-probabilities are read from them afterwards"


def test_infinite_logits_and_tiny_temperatures():
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    for temperature in (1e-4, 1e-40, 1e-300):
        assert choose_tokens(logits, [TokenChooser(SamplingParams(temperature=temperature))]) == [2]


def test_a_penalty_on_what_was_there_before():
    """As transformers' processor, over prompt and answer."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.linspace(-1, 3, 50)[None]
    chooser = TokenChooser(SamplingParams(repetition_penalty=1.7), [3, 9, -200, 3])
    answer = []
    for _ in range(30):
        expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 9, 3, *answer]]), logits.clone())
        answer += choose_tokens(logits, [chooser])
        assert answer[-1] == expected.argmax()
        chooser.note(answer[-1])
    assert len(set(answer)) > 5


def test_a_bias_forbids_and_forces():
    assert draw(logit_bias={0: -100})[1] == 1
    assert draw(temperature=1.0, logit_bias={5: 100})[5] == 1
