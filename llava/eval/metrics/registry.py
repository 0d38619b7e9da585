"""What a metric is: one decorated function. Tables, intervals, comparisons, groups and reports find it by themselves.

    @metric("open length", counts=OPEN, unit="words")
    def open_length(answer: Answer) -> float:
        return len(answer.prediction.split())

A module of this package that holds such a function needs no entry anywhere else.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from llava.errors import LlavaError
from llava.records import Record

OPEN, CLOSED, CHOICE = "OPEN", "CLOSED", "CHOICE"
"""The kinds of question: `answer_type` of the records."""

SETS = ("paper", "strict", "further")
"""*paper* and *strict* are fixed (docs/metrics.md); what is added is *further*."""

Made = TypeVar("Made")
Function = TypeVar("Function", bound=Callable[..., Any])

PAPER_SCRIPTS = ("run_eval_batch", "run_eval", "run_eval_pvqa")


@dataclass
class Answer:
    """What a metric sees of one answered question.

    Args:
        fields: what else the question's record says.
        record: the line of the answer file, with what its `metadata` say.
        script: whose rules the paper set follows, one of `PAPER_SCRIPTS`.
        candidates: open answers of the training split (`paper.Candidates`), where a file of them was given.
    """

    prediction: str
    reference: str
    answer_type: str
    question: str = ""
    id: int | str | None = None
    image: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    record: Record = field(default_factory=dict)
    script: str = PAPER_SCRIPTS[0]
    candidates: Any = None
    _kept: dict[Callable[..., Any], Any] = field(default_factory=dict, repr=False)

    def once(self, make: Callable[["Answer"], Made]) -> Made:
        """`make(answer)`, computed for the first metric that asks and kept for the others."""
        if make not in self._kept:
            self._kept[make] = make(self)
        return cast(Made, self._kept[make])

    def keep(self, make: Callable[["Answer"], Made], value: Made) -> None:
        """What `once` is to give for `make`, where it is known already."""
        self._kept[make] = value


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation: the mean of one value per question that counts.

    `function` takes an `Answer`, or with `together` the list of them, and gives a value (None: doesn't count), or a
    list of values. Values of unit "%" are fractions.
    """

    name: str
    function: Callable[[Any], Any]
    counts: str
    unit: str
    higher_is_better: bool
    metric_set: str
    label: str
    headline: str | None
    scripts: tuple[str, ...]
    together: bool

    @property
    def title(self) -> str:
        """Its name where metrics of all sets stand side by side: "paper open", "open chrF"."""
        return f"{self.metric_set} {self.headline or self.name}" if self.metric_set != "further" else self.name

    @property
    def heading(self) -> str:
        """The title, with the unit unless it is percent."""
        return self.title if self.unit == "%" else f"{self.title} ({self.unit})"

    @property
    def is_headline(self) -> bool:
        """Whether it stands in tables of several answer files, in groups and in comparisons."""
        return self.metric_set == "further" or self.headline is not None

    @property
    def scale(self) -> int:
        """What a value is multiplied by to be in the metric's unit."""
        return 100 if self.unit == "%" else 1

    def values(self, answers: Sequence[Answer]) -> list[float | None]:
        """One value per answer, None where the question doesn't count.

        Raises:
            LlavaError: the metric needs a package that isn't there.
        """
        counted = [index for index, answer in enumerate(answers) if answer.answer_type == self.counts]
        mine = [answers[index] for index in counted]
        try:
            found = self.function(mine) if self.together else [self.function(answer) for answer in mine]
        except ImportError as error:
            package = (error.name or str(error)).partition(".")[0]
            raise LlavaError(
                f'the metric "{self.name}" needs the package "{package}"; install it with: pip install {package}'
            ) from error
        values: list[float | None] = [None] * len(answers)
        for index, value in zip(counted, found, strict=True):
            values[index] = value
        return values

    def mean(self, values: Iterable[float | None]) -> float | None:
        """Mean of the values that count, in the metric's unit; None if none does."""
        counted = [value for value in values if value is not None]
        return self.scale * sum(counted) / len(counted) if counted else None


def metric(
    name: str,
    *,
    counts: str,
    unit: str = "%",
    higher_is_better: bool = True,
    label: str | None = None,
    together: bool = False,
    metric_set: str = "further",
    headline: str | None = None,
    scripts: tuple[str, ...] = PAPER_SCRIPTS,
) -> Callable[[Function], Function]:
    """Make a function a metric (see the module's text).

    Args:
        name: in JSON and in tables; unique within its set.
        counts: the questions that count: `OPEN`, `CLOSED` or `CHOICE`.
        unit: "%" for fractions, else whatever the values are in.
        label: of its row in the table of one answer file, where metrics of one label stand side by side.
        together: the function takes all answers that count at once, for what one answer alone doesn't say.
        metric_set, headline, scripts: of the two fixed sets alone: "open" or "closed" is a set's published number,
            and the paper's scripts differ in which numbers they have.
    """

    def register(function: Function) -> Function:
        made = Metric(
            name=name,
            function=function,
            counts=counts,
            unit=unit,
            higher_is_better=higher_is_better,
            metric_set=metric_set,
            label=label or name,
            headline=headline,
            scripts=scripts,
            together=together,
        )
        known = _METRICS.setdefault((metric_set, name), made)
        if known.function.__code__.co_filename != function.__code__.co_filename:
            raise ValueError(f"two metrics are called {name!r}: {known.function.__module__} and {function.__module__}")
        return function

    return register


_METRICS: dict[tuple[str, str], Metric] = {}


@cache
def all_metrics() -> tuple[Metric, ...]:
    """Every metric of this package's modules, by set."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return tuple(sorted(_METRICS.values(), key=lambda found: SETS.index(found.metric_set)))


def metrics_of(script: str) -> list[Metric]:
    """The metrics there are under the rules of a published script."""
    if script not in PAPER_SCRIPTS:
        raise ValueError(f"unknown script {script!r}; one of {PAPER_SCRIPTS}")
    return [found for found in all_metrics() if script in found.scripts]


def headline_name(metric_set: str, kind: str) -> str:
    """The number of *paper* or *strict* that published tables call "open" or "closed"."""
    return next(m.name for m in all_metrics() if (m.metric_set, m.headline) == (metric_set, kind))
