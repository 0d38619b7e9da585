"""How sure a score is: bootstrap intervals of a mean, and paired comparisons of two models."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from llava.eval.scoring_flags import RESAMPLES

_CHUNK = 4_000_000  # drawn indices held at a time


def bootstrap_interval(
    values: Sequence[float | None],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of the mean of `values` (None: not counted); None if nothing counts, or a single cluster:
    each draw would be the same one.

    With `clusters` (say, each question's image) whole clusters are drawn, because the questions on one
    image are not independent.
    """
    return _percentiles(*_cluster_sums(values, clusters), resamples=resamples, level=level, seed=seed)


def share_interval(
    values: Sequence[float | None],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """`bootstrap_interval` of shares (values from 0 to 1). Where all are 0, or all 1, each draw would give the same:
    there it is Wilson's interval, of as many trials as there are clusters.
    """
    sums, counts = _cluster_sums(values, clusters)
    if len(sums) and (not sums.any() or (sums == counts).all()):
        return wilson_interval(len(sums) if sums.any() else 0, len(sums), level=level)
    return _percentiles(sums, counts, resamples=resamples, level=level, seed=seed)


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, as fractions (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / trials
    middle = share + z * z / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions: fractions, `difference` is the second's mean minus the first's.

    `low`, `high` and `p_value` are None where a single question (or cluster) is compared; else `p_value` is the paired
    bootstrap's (two-sided). For right/wrong scores `only_first` and `only_second` count the questions that one alone
    has right and `mcnemar_p` is McNemar's exact test; else they are None.
    """

    questions: int
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    only_first: int | None = None
    only_second: int | None = None
    mcnemar_p: float | None = None


def compare_paired(
    first: Sequence[float | None],
    second: Sequence[float | None],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison | None:
    """Compare two aligned lists of scores; questions that one of them doesn't count are left out."""
    pairs = [(a, b) if a is not None and b is not None else None for a, b in zip(first, second, strict=True)]
    differences = [None if pair is None else pair[1] - pair[0] for pair in pairs]
    sums, counts = _cluster_sums(differences, clusters)
    if not len(sums):
        return None
    low = high = p_value = None
    if len(sums) > 1:
        means = _resampled_means(sums, counts, resamples, seed)
        low, high = map(float, np.percentile(means, [2.5, 97.5]))
        # The smaller tail beyond "no difference", twice; one more resample keeps it above zero.
        tail = min((means <= 0).sum(), (means >= 0).sum())
        p_value = float(min(1.0, 2 * (tail + 1) / (resamples + 1)))
    scored = [pair for pair in pairs if pair is not None]
    result = Comparison(
        questions=len(scored),
        first=float(np.mean([a for a, _ in scored])),
        second=float(np.mean([b for _, b in scored])),
        difference=float(sums.sum() / counts.sum()),
        low=low,
        high=high,
        p_value=p_value,
    )
    if not all(value in (0.0, 1.0) for pair in scored for value in pair):
        return result
    only_first, only_second = sum(a > b for a, b in scored), sum(b > a for a, b in scored)
    return replace(result, only_first=only_first, only_second=only_second, mcnemar_p=mcnemar(only_first, only_second))


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p value from the two counts of questions that one model alone has right."""
    total, smaller = only_first + only_second, min(only_first, only_second)
    tail = ways = 1
    for count in range(1, smaller + 1):  # each of Pascal's numbers from the one before it
        ways = ways * (total - count + 1) // count
        tail += ways
    return min(1.0, 2 * tail / (1 << total))


def _percentiles(
    sums: np.ndarray, counts: np.ndarray, *, resamples: int, level: float, seed: int
) -> tuple[float, float] | None:
    if len(sums) < 2:
        return None
    tail = 50 * (1 - level)
    low, high = np.percentile(_resampled_means(sums, counts, resamples, seed), [tail, 100 - tail])
    return float(low), float(high)


def _cluster_sums(values: Sequence[float | None], clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the counted values of each cluster (of each question without clusters)."""
    clusters = range(len(values)) if clusters is None else clusters
    totals: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        if value is not None:
            entry = totals.setdefault(cluster, [0.0, 0])
            entry[0] += value
            entry[1] += 1
    table = np.array(list(totals.values()), dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    size = len(sums)
    step = max(1, _CHUNK // size)
    means = []
    for start in range(0, resamples, step):
        drawn = random.integers(0, size, size=(min(step, resamples - start), size))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)
