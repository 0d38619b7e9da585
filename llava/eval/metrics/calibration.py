"""What the probabilities of yes and no are worth: accuracy, calibration error, area under the ROC curve."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Answers whose confidence lies in (low, high]: their number, mean confidence and share of right ones."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Fractions. `ece` is the expected calibration error over `bins` of equal width; `auc` None with one class."""

    questions: int
    yes_share: float
    accuracy: float
    ece: float
    brier: float
    auc: float | None
    bins: list[Bin]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(p_yes: Sequence[float], is_yes: Sequence[bool], bins: int = BINS) -> Calibration | None:
    """How well P(yes) against P(no) fits what is true; None without questions.

    The answer is the likelier word and the confidence its probability, from 0.5 to 1, so half of the bins are
    ever used.
    """
    if not len(p_yes):
        return None
    chances, truth = np.asarray(p_yes, dtype=np.float64), np.asarray(is_yes, dtype=bool)
    right = (chances >= 0.5) == truth
    confidence = np.maximum(chances, 1 - chances)
    filled, error = [], 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            sure, hits = float(confidence[inside].mean()), float(right[inside].mean())
            error += inside.mean() * abs(sure - hits)
            filled.append(Bin(low, high, int(inside.sum()), sure, hits))
    return Calibration(
        questions=len(chances),
        yes_share=float(truth.mean()),
        accuracy=float(right.mean()),
        ece=float(error),
        brier=float(((chances - truth) ** 2).mean()),
        auc=roc_auc(chances, truth),
        bins=filled,
    )


def roc_auc(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Chance that a true one scores above a false one, ties counting half."""
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal scores share their mean rank
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))
