"""The *strict* set: whole words, each counted once, and yes or no only where an answer says one of them.

Open questions score by set recall, closed ones by accuracy; docs/metrics.md gives the reasons.
"""

import re
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from llava.eval.metrics.registry import CLOSED, OPEN, Answer, metric
from llava.eval.metrics.words import strict_words


@dataclass(frozen=True)
class StrictItem:
    """Scores of one answer, fractions. `correct` is meant for closed questions, the rest for open ones.

    `polarity` is what the answer says: "yes", "no", "both" or "neither".
    """

    correct: float
    exact: float
    f1: float
    precision: float
    recall: float
    polarity: str

    def as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def strict_item(prediction: str, reference: str, question: str = "") -> StrictItem:
    """Score one answer.

    Recall is the share of the reference's distinct words that are said; precision and F1 count each word at
    most as often as it stands in the reference. A closed answer is correct if
    - the reference says yes or no: the answer says that one, as a word, and not the other;
    - else: the reference's words stand in the answer one after the other, nowhere denied by the character before
      them (没有 doesn't say 有), and no other option that the question offers ("… two options: [left, right]")
      stands there.
    """
    said, wanted = strict_words(str(prediction)), strict_words(str(reference))
    if not wanted:  # a reference of marks alone, such as "+"
        same = float(str(prediction).strip() == str(reference).strip())
        return StrictItem(same, same, same, same, same, _polarity(said))
    overlap = (Counter(said) & Counter(wanted)).total()
    precision, coverage = overlap / len(said) if said else 0.0, overlap / len(wanted)
    return StrictItem(
        correct=float(_is_correct(said, wanted, question)),
        exact=float(said == wanted),
        f1=2 * precision * coverage / (precision + coverage) if overlap else 0.0,
        precision=precision,
        recall=len(set(said) & set(wanted)) / len(set(wanted)),
        polarity=_polarity(said),
    )


def strict_scores(answer: Answer) -> StrictItem:
    """`strict_item` of an answer; metrics share it by `answer.once`."""
    return strict_item(answer.prediction, answer.reference, answer.question)


_open = partial(metric, counts=OPEN, metric_set="strict")
_closed = partial(metric, counts=CLOSED, metric_set="strict")


@_open("open recall", label="open: recall", headline="open")
def _recall(answer: Answer) -> float:
    return answer.once(strict_scores).recall


@_open("open precision", label="open: precision")
def _precision(answer: Answer) -> float:
    return answer.once(strict_scores).precision


@_open("open f1", label="open: f1")
def _f1(answer: Answer) -> float:
    return answer.once(strict_scores).f1


@_open("open exact match", label="open: exact match")
def _exact(answer: Answer) -> float:
    return answer.once(strict_scores).exact


@_closed("closed accuracy", label="closed: accuracy", headline="closed")
def _accuracy(answer: Answer) -> float:
    return answer.once(strict_scores).correct


@_closed("closed undecided", label="closed: says yes and no", higher_is_better=False)
def _undecided(answer: Answer) -> float:
    return float(answer.once(strict_scores).polarity == "both")


def reference_polarity(reference: str) -> str:
    """What a reference answer says: "yes", "no", "both" or "neither"."""
    return _polarity(strict_words(str(reference)))


def question_options(question: str) -> list[list[str]]:
    """The options that a closed question of the released files offers, as words."""
    match = _OPTIONS.search(question)
    # Looked for once: in a pattern, to the end of the text from each place that such a list begins at.
    options, bracket, _ = question[match.end() :].partition("]") if match else ("", "", "")
    return [strict_words(option) for option in options.split(",")] if bracket else []


_OPTIONS = re.compile(r"choose from the following(?: \w+)? options:\s*\[", re.IGNORECASE)


def _is_correct(said: list[str], wanted: list[str], question: str) -> bool:
    polarity = _polarity(wanted)
    if polarity in {"yes", "no"}:
        return _polarity(said) == polarity
    others = [option for option in question_options(question) if option and not _stands_in(option, wanted)]
    others = [option for option in others if not _stands_in(wanted, option)]
    if _is_denied(wanted, said):
        return False
    return _stands_in(wanted, said) and not any(_stands_in(option, said) for option in others)


_DENIALS = frozenset("不没沒无無非未否")


def _is_denied(words: list[str], text: list[str]) -> bool:
    """Whether Chinese words stand after a character that denies them, where each character is a word of its own."""
    return len(words[0]) == 1 and any(start and text[start - 1] in _DENIALS for start in _places(words, text))


def _stands_in(words: list[str], text: list[str]) -> bool:
    return bool(_places(words, text))


def _places(words: list[str], text: list[str]) -> list[int]:
    """Where `words` stand in `text` one after the other."""
    return [start for start in range(len(text) - len(words) + 1) if text[start : start + len(words)] == words]


def _polarity(words: list[str]) -> str:
    yes, no = "yes" in words, "no" in words
    return {(True, False): "yes", (False, True): "no", (True, True): "both", (False, False): "neither"}[yes, no]
