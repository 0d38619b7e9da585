"""The *paper* set: the numbers of LLaVA-Med v1.0's metric scripts, faults included.

`paper_item` scores one answer, `paper_summary` averages as one of the three published scripts does. The
published table comes from `run_eval_batch`: "open" is its recall, "closed" its yes/no accuracy.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from llava.eval.metrics.words import normalize_word

PAPER_SCRIPTS = ("run_eval_batch", "run_eval", "run_eval_pvqa")


@dataclass(frozen=True)
class PaperItem:
    """Scores of one answer, fractions. `appearance` is None without candidates."""

    exact: float
    f1: float
    precision: float
    recall: float
    bleu: float
    bleu_1: float
    bleu_2: float
    bleu_3: float
    contained: float
    says_yes_or_no: bool
    appearance: float | None = None

    def as_dict(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def paper_item(prediction: str, reference: str, candidates: "Candidates | None" = None) -> PaperItem:
    """Score one answer as the published code does.

    `contained` is "the normalised reference is a substring of the normalised prediction", so an empty
    reference is contained in everything. The counts of F1, precision and recall take the prediction's
    multiplicity for hits and the reference's for misses. `exact` is not an exact match: distinct reference words
    found over the number of predicted words.
    """
    prediction, reference = (normalize_word(str(text).lower()) for text in (prediction, reference))
    said, wanted = _counts(prediction), _counts(reference)
    precision, recall, f1 = _precision_recall_f1(said, wanted)
    bleu, bleu_1, bleu_2, bleu_3 = _bleu(prediction.split(), reference.split())
    return PaperItem(
        exact=sum(word in said for word in wanted) / said.total() if said else 0.0,
        f1=f1,
        precision=precision,
        recall=recall,
        bleu=bleu,
        bleu_1=bleu_1,
        bleu_2=bleu_2,
        bleu_3=bleu_3,
        contained=float(reference in prediction),
        says_yes_or_no="yes" in prediction or "no" in prediction,
        appearance=None if candidates is None else float(candidates.nearest(said) == wanted),
    )


class Candidates:
    """The open answers of the training split, against which "open accuracy" is measured."""

    def __init__(self, answers: Iterable[object]):
        self._words = [_counts(str(answer)) for answer in answers]
        if not self._words:
            raise ValueError("no candidate answers")

    def nearest(self, said: Counter) -> Counter:
        """The candidate most of whose distinct words are said; the first of equals."""
        return max(self._words, key=lambda words: sum(w in said for w in words) / len(words) if words else 0.0)


def paper_summary(
    items: Sequence[PaperItem], answer_types: Sequence[str], script: str = "run_eval_batch"
) -> dict[str, float | None]:
    """Means in percent under the names the scripts print; None where there is nothing to average."""
    numbers = {name: percent(values) for name, values in paper_values(items, answer_types, script).items()}
    if script != "run_eval_batch" and numbers["yes/no accuracy"] is None and items:
        numbers["yes/no accuracy"] = 0.0  # these two print 0 where no closed answer was counted
    return numbers


def paper_values(
    items: Sequence[PaperItem], answer_types: Sequence[str], script: str = "run_eval_batch"
) -> dict[str, list[float | None]]:
    """What each number is the mean of: one value per question, None where the question doesn't count.

    Args:
        items: one per question, in the order of `answer_types` ("OPEN" or "CLOSED").
        script: whose rules for open and closed accuracy to follow, one of `PAPER_SCRIPTS`.
    """
    if script not in PAPER_SCRIPTS:
        raise ValueError(f"unknown script {script!r}; one of {PAPER_SCRIPTS}")

    def values(kind, value):
        return [value(item) if answer_type == kind else None for item, answer_type in zip(items, answer_types)]

    names = {n: k for n, k in _OPEN_NUMBERS.items() if script != "run_eval_pvqa" or not n.startswith("bleu")}
    numbers = {name: values("OPEN", lambda item, key=key: getattr(item, key)) for name, key in names.items()}
    if script == "run_eval_batch":
        numbers["open accuracy"] = values("OPEN", lambda item: item.contained)
        numbers["yes/no accuracy"] = values("CLOSED", lambda item: item.contained)
        numbers["recall_closed"] = values("CLOSED", lambda item: item.recall)
    else:
        numbers["open accuracy"] = values("OPEN", lambda item: item.appearance)
        hit = _hit_or_left_out if script == "run_eval_pvqa" else _hit_if_yes_or_no
        numbers["yes/no accuracy"] = values("CLOSED", hit)
    return numbers


def percent(values: Iterable[float | None]) -> float | None:
    """Mean of those that count, in percent; None if none does."""
    counted = [value for value in values if value is not None]
    return 100 * sum(counted) / len(counted) if counted else None


def _hit_if_yes_or_no(item: PaperItem) -> float:
    return item.contained if item.says_yes_or_no else 0.0


def _hit_or_left_out(item: PaperItem) -> float | None:
    """As the PathVQA script counts: a wrong answer that says yes or no is in no list at all."""
    if not item.says_yes_or_no:
        return 0.0
    return 1.0 if item.contained else None


_OPEN_NUMBERS = {
    "exact match score": "exact",
    "f1 score": "f1",
    "precision": "precision",
    "recall": "recall",
    "bleu_score": "bleu",
    "bleu_score_1": "bleu_1",
    "bleu_score_2": "bleu_2",
    "bleu_score_3": "bleu_3",
}


def _counts(text: str) -> Counter:
    # The published functions normalise what was normalised before, which strips 32 more periods.
    return Counter(normalize_word(text.lower()).split())


def _precision_recall_f1(said: Counter, wanted: Counter) -> tuple[float, float, float]:
    hits = sum(count for word, count in said.items() if word in wanted)
    if not hits:
        return 0.0, 0.0, 0.0
    misses = sum(count for word, count in wanted.items() if word not in said)
    precision, recall = hits / said.total(), hits / (hits + misses)
    return precision, recall, 2 * precision * recall / (precision + recall)


def _bleu(said: list[str], wanted: list[str]) -> list[float]:
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():  # it warns of every answer shorter than four words
        warnings.simplefilter("ignore")
        return [float(sentence_bleu([wanted], said, weights=weights)) for weights in _BLEU_WEIGHTS]


# "bleu_score_2" is the precision of pairs alone, not the usual mean of words and pairs; so with 3.
_BLEU_WEIGHTS = ((0.25,) * 4, (1.0,), (0.0, 1.0), (0.0, 0.0, 1.0))
