"""Scores as text: aligned columns for the terminal, pipes for Markdown."""

from collections.abc import Sequence

from llava.eval.metrics.calibration import Calibration
from llava.eval.metrics.score import Number, Scores

SCORE_ROWS = (
    ("open: recall", "recall", "open recall"),
    ("open: precision", "precision", "open precision"),
    ("open: f1", "f1 score", "open f1"),
    ("open: exact match", "exact match score", "open exact match"),
    ("open: accuracy", "open accuracy", None),
    ("open: BLEU", "bleu_score", None),
    ("open: BLEU-1", "bleu_score_1", None),
    ("open: BLEU-2", "bleu_score_2", None),
    ("open: BLEU-3", "bleu_score_3", None),
    ("closed: accuracy", "yes/no accuracy", "closed accuracy"),
    ("closed: recall", "recall_closed", None),
    ("closed: says yes and no", None, "closed undecided"),
)
"""Label, name in the paper set, name in the strict set."""


def score_table(scores: Scores, digits: int = 4) -> str:
    """Both sets side by side, one row per number, with intervals."""
    rows = []
    for label, paper, strict in SCORE_ROWS:
        cells = [
            number_cell(scores.numbers[name].get(key), digits) if key else ""
            for name, key in (("paper", paper), ("strict", strict))
        ]
        if any(cells):
            rows.append([label, *cells])
    return text_table(["metric (%)", "paper", "strict"], rows)


def group_table(name: str, groups: dict[str, dict]) -> str:
    """The headline numbers of each group of questions."""
    columns = ("paper open", "strict open", "paper closed", "strict closed")
    rows = [
        [key, str(row["open"]), str(row["closed"]), *(plain(row[column]) for column in columns)]
        for key, row in groups.items()
    ]
    return text_table([name, "open", "closed", *columns], rows)


def calibration_line(found: Calibration) -> str:
    """Yes/no questions by token probabilities, on a line."""
    auc = "-" if found.auc is None else f"{found.auc:.4f}"
    return (
        f"yes against no by token probabilities, {found.questions} questions: accuracy {100 * found.accuracy:.2f} %, "
        f"calibration error (ECE) {100 * found.ece:.2f} %, Brier {found.brier:.4f}, area under the ROC curve {auc}"
    )


def number_cell(number: Number | None, digits: int = 2) -> str:
    """ "64.39 [57.12, 71.33]", or "-" where nothing counts."""
    if number is None:
        return ""
    if number.value is None:
        return "-"
    interval = "" if number.low is None else f"  [{number.low:.2f}, {number.high:.2f}]"
    return f"{number.value:.{digits}f}{interval}"


def plain(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, a line below the header."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
