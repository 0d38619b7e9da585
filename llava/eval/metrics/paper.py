"""The *paper* set: the numbers of LLaVA-Med v1.0's metric scripts, faults included.

`paper_item` scores one answer, `paper_summary` averages as one of the three published scripts (`PAPER_SCRIPTS`) does.
The published table comes from `run_eval_batch`: "open" is its recall, "closed" its yes/no accuracy.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from llava.eval.metrics.registry import CLOSED, OPEN, Answer, metric, metrics_of
from llava.eval.metrics.words import normalize_word


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

    def as_dict(self) -> dict[str, Any]:
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
        self._places: dict[str, list[int]] = {}
        for place, words in enumerate(self._words):
            for word in words:
                self._places.setdefault(word, []).append(place)

    def nearest(self, said: Counter[str]) -> Counter[str]:
        """The candidate most of whose distinct words are said; the first of equals."""
        hits = Counter(place for word in said for place in self._places.get(word, ()))
        if not hits:
            return self._words[0]
        return self._words[min(hits, key=lambda place: (-hits[place] / len(self._words[place]), place))]


def paper_summary(
    items: Sequence[PaperItem], answer_types: Sequence[str], script: str = "run_eval_batch"
) -> dict[str, float | None]:
    """Means in percent under the names the scripts print; None where there is nothing to average.

    Args:
        items: one per question, in the order of `answer_types` ("OPEN" or "CLOSED").
        script: whose rules for open and closed accuracy to follow, one of `PAPER_SCRIPTS`.
    """
    answers = [Answer("", "", kind, script=script) for kind in answer_types]
    for answer, item in zip(answers, items, strict=True):
        answer.keep(paper_scores, item)
    metrics = [found for found in metrics_of(script) if found.metric_set == "paper"]
    numbers = {found.name: found.mean(found.values(answers)) for found in metrics}
    if script != "run_eval_batch" and numbers["yes/no accuracy"] is None and items:
        numbers["yes/no accuracy"] = 0.0  # these two print 0 where no closed answer was counted
    return numbers


def paper_scores(answer: Answer) -> PaperItem:
    """`paper_item` of an answer; metrics share it by `answer.once`."""
    return paper_item(answer.prediction, answer.reference, answer.candidates)


_open = partial(metric, counts=OPEN, metric_set="paper")
_closed = partial(metric, counts=CLOSED, metric_set="paper")
_WITH_BLEU = ("run_eval_batch", "run_eval")


@_open("recall", label="open: recall", headline="open")
def _recall(answer: Answer) -> float:
    return answer.once(paper_scores).recall


@_open("precision", label="open: precision")
def _precision(answer: Answer) -> float:
    return answer.once(paper_scores).precision


@_open("f1 score", label="open: f1")
def _f1(answer: Answer) -> float:
    return answer.once(paper_scores).f1


@_open("exact match score", label="open: exact match")
def _exact(answer: Answer) -> float:
    return answer.once(paper_scores).exact


@_open("open accuracy", label="open: accuracy")
def _open_accuracy(answer: Answer) -> float | None:
    item = answer.once(paper_scores)
    return item.contained if answer.script == "run_eval_batch" else item.appearance


@_open("bleu_score", label="open: BLEU", scripts=_WITH_BLEU)
def _bleu_4(answer: Answer) -> float:
    return answer.once(paper_scores).bleu


@_open("bleu_score_1", label="open: BLEU-1", scripts=_WITH_BLEU)
def _bleu_1(answer: Answer) -> float:
    return answer.once(paper_scores).bleu_1


@_open("bleu_score_2", label="open: BLEU-2", scripts=_WITH_BLEU)
def _bleu_2(answer: Answer) -> float:
    return answer.once(paper_scores).bleu_2


@_open("bleu_score_3", label="open: BLEU-3", scripts=_WITH_BLEU)
def _bleu_3(answer: Answer) -> float:
    return answer.once(paper_scores).bleu_3


@_closed("yes/no accuracy", label="closed: accuracy", headline="closed")
def _yes_no_accuracy(answer: Answer) -> float | None:
    item = answer.once(paper_scores)
    if answer.script != "run_eval_batch" and not item.says_yes_or_no:
        return 0.0
    # The PathVQA script puts a wrong answer that says yes or no in no list at all.
    return None if answer.script == "run_eval_pvqa" and not item.contained else item.contained


@_closed("recall_closed", label="closed: recall", scripts=("run_eval_batch",))
def _recall_closed(answer: Answer) -> float:
    return answer.once(paper_scores).recall


def _counts(text: str) -> Counter[str]:
    # The published functions normalise what was normalised before, which strips 32 more periods.
    return Counter(normalize_word(text.lower()).split())


def _precision_recall_f1(said: Counter[str], wanted: Counter[str]) -> tuple[float, float, float]:
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
