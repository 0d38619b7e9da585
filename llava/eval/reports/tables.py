"""Scores as text: aligned columns for the terminal, pipes for Markdown."""

from collections.abc import Iterable, Sequence

from llava.errors import amount, one_line
from llava.eval.metrics.calibration import Calibration
from llava.eval.metrics.registry import CHOICE, CLOSED, OPEN, SETS, Metric, all_metrics
from llava.eval.metrics.score import Number, Scores, headlines


def score_table(scores: Scores) -> str:
    """All numbers, one row per label with a column per set, with intervals."""
    rows: dict[str, dict[str, str]] = {}
    for metric in sorted(all_metrics(), key=lambda found: (OPEN, CLOSED, CHOICE).index(found.counts)):
        if cell := number_cell(scores.number(metric)):
            rows.setdefault(_row_label(metric), {})[metric.metric_set] = cell
    columns = [name for name in SETS if any(name in cells for cells in rows.values())]
    table = [[label, *(cells.get(name, "") for name in columns)] for label, cells in rows.items()]
    return text_table(["metric (%)", *columns], table)


def _row_label(metric: Metric) -> str:
    unit = "" if metric.unit == "%" else f" ({metric.unit})"
    return f"{metric.label}{unit}{'' if metric.higher_is_better else ' (less is better)'}"


def group_table(name: str, groups: dict[str, dict], scores: Scores) -> str:
    """The headline numbers of each group of questions."""
    shown, kinds = headlines([scores]), kinds_of([scores])
    rows = [
        [key, *(str(row[kind]) for kind in kinds), *(plain(row[metric.title]) for metric in shown)]
        for key, row in groups.items()
    ]
    return text_table([name, *kinds, *(metric.heading for metric in shown)], rows)


def kinds_of(several: Iterable[Scores]) -> list[str]:
    """The kinds of question that tables count: open and closed ones, and multiple-choice where there are some."""
    return ["open", "closed", *(["choice"] if any(scores.choice for scores in several) else [])]


def count_cells(scores: Scores | None, kinds: Sequence[str]) -> list[str]:
    """How many questions of each kind were scored; None scored none."""
    return [str(getattr(scores, kind) if scores else 0) for kind in kinds]


def calibration_line(found: Calibration) -> str:
    """Yes/no questions by token probabilities, on a line."""
    auc = "-" if found.auc is None else f"{found.auc:.4f}"
    return (
        f"yes against no by token probabilities, {amount(found.questions, 'question')}: "
        f"accuracy {100 * found.accuracy:.2f} %, calibration error (ECE) {100 * found.ece:.2f} %, "
        f"Brier {found.brier:.4f}, area under the ROC curve {auc}"
    )


def number_cell(number: Number | None) -> str:
    """ "64.39 [57.12, 71.33]", or "-" where nothing counts."""
    if number is None:
        return ""
    if number.value is None:
        return "-"
    interval = "" if number.low is None else f"  [{number.low:.2f}, {number.high:.2f}]"
    return f"{number.value:.2f}{interval}"


def plain(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, a line below the header; of a long cell its beginning and its end."""
    table = [[one_line(cell, 200) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what would end a cell, begin HTML, or make a link or image of a name is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)


def _markdown_cell(text: str) -> str:
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")
    return " ".join(text.splitlines())
