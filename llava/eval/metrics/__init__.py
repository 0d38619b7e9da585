"""Scores of medical visual questions: the published scripts' numbers (*paper*) and the honest ones (*strict*).

`score_items` computes both over joined items; `paper` and `strict` hold one function per item each,
`words` the two normalisations, `intervals` bootstrap intervals and paired comparisons, `calibration` what
token probabilities of yes and no say. docs/metrics.md defines every number.
"""

from llava.eval.metrics.paper import PAPER_SCRIPTS, PaperItem, paper_item, paper_summary
from llava.eval.metrics.score import Scores, score_items
from llava.eval.metrics.strict import StrictItem, strict_item, strict_summary
from llava.eval.metrics.words import normalize_word, strict_words

__all__ = [
    "PAPER_SCRIPTS",
    "PaperItem",
    "Scores",
    "StrictItem",
    "normalize_word",
    "paper_item",
    "paper_summary",
    "score_items",
    "strict_item",
    "strict_summary",
    "strict_words",
]
