"""Two models on the same questions: McNemar's test and the paired bootstrap."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llava.eval.metrics.intervals import Comparison, compare_paired
from llava.eval.metrics.joined import clusters_of
from llava.eval.metrics.registry import Metric
from llava.eval.metrics.score import headlines
from llava.eval.reports.evaluation import Evaluation, evaluate
from llava.eval.reports.tables import plain, text_table


@dataclass
class AnswerComparison:
    """The headline numbers of two answer files compared, on the `shared` of `questions` that both answer."""

    first: Path
    second: Path
    numbers: dict[Metric, Comparison]
    shared: int
    questions: int
    labels: tuple[str, str] = ("first", "second")
    subtracted: str = "second minus first"

    def as_dict(self) -> dict:
        numbers = {metric.title: asdict(found) for metric, found in self.numbers.items()}
        counts = {"questions": self.questions, "answered_by_both": self.shared}
        return {"first": str(self.first), "second": str(self.second), **counts, **numbers}

    @property
    def remark(self) -> str | None:
        """Which questions are compared, where it isn't all: the scores of each file alone are of others."""
        if self.shared == self.questions:
            return None
        return f"compared on the {self.shared} of {self.questions} questions that both answer"

    def text(self) -> str:
        rows = []
        for metric, found in self.numbers.items():
            mcnemar = "" if found.mcnemar_p is None else p_text(found.mcnemar_p)
            alone = "" if found.only_first is None else f"{found.only_first} / {found.only_second}"
            rows.append([metric.heading, *comparison_cells(metric, found), alone, mcnemar])
        first, second = self.labels
        header = ["metric (%)", first, second, self.subtracted, "p (bootstrap)", "right alone", "p (McNemar)"]
        files = f"{first}: {self.first}\n{second}: {self.second}\n{self.remark or ''}"
        return f"{files.rstrip()}\n\n{text_table(header, rows)}"


def turned(found: Comparison) -> Comparison:
    """The same comparison with the difference the other way round: what the first has more than the second."""
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return replace(found, difference=-found.difference, low=low, high=high)


def compare_with_memory(model: Evaluation, memory: Evaluation) -> AnswerComparison:
    """A model's answers beside those from memory; the difference is what the model adds."""
    found = compare_evaluations(model, memory)
    numbers = {metric: turned(number) for metric, number in found.numbers.items()}
    return replace(found, numbers=numbers, labels=("model", "memory"), subtracted="model minus memory")


def evaluate_alike(first: Evaluation, pred: str | Path) -> Evaluation:
    """The answers of `pred` to the questions of `first`, scored by the same rules, to be compared with it."""
    settings = first.settings
    return evaluate(
        first.gt, pred, on_missing=settings["on_missing"], script=settings["script"], group_by=(), resamples=0
    )


def compare_evaluations(first: Evaluation, other: Evaluation) -> AnswerComparison:
    """Compare two evaluated answer files to the same questions, scored by the same rules: second minus first."""
    settings = first.settings
    places = {str(entry.item.id): index for index, entry in enumerate(other.joined)}
    shared = [(i, places[str(e.item.id)]) for i, e in enumerate(first.joined) if str(e.item.id) in places]
    clusters = clusters_of([first.joined[i] for i, _ in shared], settings["unit"])
    numbers = {}
    for metric in headlines([first.scores]):
        ours = first.scores.values[metric.metric_set][metric.name]
        theirs = other.scores.values[metric.metric_set].get(metric.name)
        if theirs is None:
            continue  # it counts no question of the other file
        found = compare_paired(
            [ours[i] for i, _ in shared],
            [theirs[j] for _, j in shared],
            clusters,
            resamples=settings["resamples"] or 10_000,
            seed=settings["bootstrap_seed"],
        )
        if found is not None:
            numbers[metric] = found
    return AnswerComparison(first.pred, other.pred, numbers, len(shared), first.asked)


def p_text(value: float | None) -> str:
    """A p value with four decimals, or that it is below what they show; "-" for none."""
    return "< 0.0001" if value is not None and value < 0.0001 else plain(value, 4)


def comparison_cells(metric: Metric, found: Comparison) -> list[str]:
    """Both means, their difference with its interval, and the bootstrap's p value, in the metric's unit."""
    scale = metric.scale
    change = f"{scale * found.difference:+.2f}"
    if found.low is not None and found.high is not None:
        change += f" [{scale * found.low:+.2f}, {scale * found.high:+.2f}]"
    return [f"{scale * found.first:.2f}", f"{scale * found.second:.2f}", change, p_text(found.p_value)]
