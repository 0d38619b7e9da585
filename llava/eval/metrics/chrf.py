"""chrF: overlap of letters instead of words (Popović 2015), which an ending, a compound or Chinese doesn't break."""

from functools import cache
from typing import Any

from llava.eval.metrics.registry import OPEN, Answer, metric


@metric("open chrF", counts=OPEN, label="open: chrF")
def open_chrf(answer: Answer) -> float:
    """sacrebleu's chrF2 of one answer, whatever the case: n-grams of 1 to 6 letters, recall counting twice."""
    score: float = _chrf().sentence_score(answer.prediction, [answer.reference]).score
    return score / 100


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(lowercase=True)
