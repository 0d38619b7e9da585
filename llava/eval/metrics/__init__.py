"""Scores of medical visual questions: the published scripts' numbers (*paper*), the honest ones (*strict*), and more.

A metric is one decorated function (`registry.metric`); `score_items` computes all of them over joined items. `paper`
and `strict` hold the two fixed sets, `words` the two normalisations, `intervals` bootstrap intervals and paired
comparisons, `calibration` what token probabilities of yes and no say. docs/metrics.md defines every number.
"""

from llava.eval.metrics.paper import PaperItem, paper_item, paper_summary
from llava.eval.metrics.registry import CHOICE, CLOSED, OPEN, PAPER_SCRIPTS, Answer, Metric, all_metrics, metric
from llava.eval.metrics.score import Scores, score_items
from llava.eval.metrics.strict import StrictItem, strict_item
from llava.eval.metrics.words import normalize_word, strict_words

__all__ = [
    "CHOICE",
    "CLOSED",
    "OPEN",
    "PAPER_SCRIPTS",
    "Answer",
    "Metric",
    "PaperItem",
    "Scores",
    "StrictItem",
    "all_metrics",
    "metric",
    "normalize_word",
    "paper_item",
    "paper_summary",
    "score_items",
    "strict_item",
    "strict_words",
]
