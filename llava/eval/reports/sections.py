"""The sections of an evaluation report, each from evaluated answer files to HTML; empty where there is nothing."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llava.eval.answers.manifest import describe
from llava.eval.metrics.intervals import Comparison
from llava.eval.metrics.joined import JoinedItem
from llava.eval.metrics.registry import CLOSED, Metric
from llava.eval.metrics.score import headlines
from llava.eval.metrics.strict import reference_polarity
from llava.eval.reports.clean_subset import CleanScores
from llava.eval.reports.compare import (
    AnswerComparison,
    compare_evaluations,
    compare_with_memory,
    comparison_cells,
    p_text,
)
from llava.eval.reports.evaluation import Evaluation
from llava.eval.reports.published import DATASET_NAMES, PUBLISHED, TEST_COUNTS, recognise_dataset
from llava.eval.reports.tables import calibration_line, count_cells, kinds_of, number_cell, plain
from llava.folders import is_file
from llava.image_options import with_options_of
from llava.images import open_image
from llava.pages import Card, figure, figures, folded, gallery, note, preformatted, subheading, table, warning
from llava.pages.charts import bars, reliability
from llava.record_content import image_file

_CONFUSIONS = (("yes", "yes"), ("yes", "no"), ("yes", "other"), ("no", "no"), ("no", "yes"), ("no", "other"))
_TYPES = ("question_type", "content_type", "category", "family")
"""Fields of records that say what a question is about, by data set."""
_RUN = (
    "checkpoint",
    "checkpoint_digest",
    "template",
    "decoding",
    "ablate_image",
    "image_options",
    "questions",
    "questions_sha256",
)
"""What the fold shows of a manifest."""


@dataclass
class Entry:
    """An evaluated answer file under the name that the report gives it."""

    label: str
    result: Evaluation

    @property
    def ablation(self) -> str:
        """What was done to the images; "none" without a manifest."""
        return (self.result.manifest or {}).get("ablate_image") or "none"

    @property
    def is_memory(self) -> bool:
        """Whether no model gave these answers (llava.eval.baselines)."""
        return "memory" in (self.result.manifest or {})

    @property
    def dataset(self) -> str | None:
        found = recognise_dataset(self.result.gt, self.result.dataset)
        fields = (joined.item.fields for joined in self.result.joined)
        if found == "slake" and any((given.get("language") or given.get("q_lang") or "en") != "en" for given in fields):
            return None  # the published rows are of the English questions
        return found

    @property
    def questions(self) -> Path:
        """The file of questions, by the one name that it has however it was given."""
        return self.result.gt.resolve()


def score_rows(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]], list[str]]:
    """(header, rows, CSS classes): our answer files by data set, the published rows below each set's."""
    shown = headlines(entry.result.scores for entry in entries)
    kinds = kinds_of(entry.result.scores for entry in entries)
    header = ["model", "data set", " / ".join(kinds), *(metric.heading for metric in shown)]
    rows, classes = [], []
    for dataset in dict.fromkeys(entry.dataset for entry in entries):
        ours = [entry for entry in entries if entry.dataset == dataset]
        for entry in ours:
            scores = entry.result.scores
            name = DATASET_NAMES.get(dataset or "", entry.result.gt.stem)
            cells = [number_cell(scores.number(metric)) for metric in shown]
            rows.append([entry.label, name, " / ".join(count_cells(scores, kinds)), *cells])
            classes.append("")
        if dataset is None:
            continue
        for row in PUBLISHED.get(dataset, ()):
            counts = " / ".join(map(str, [*TEST_COUNTS[dataset], 0][: len(kinds)]))
            name = f"{DATASET_NAMES[dataset]}, published"
            rows.append([row.model, name, counts, plain(row.open), plain(row.closed), *[""] * (len(shown) - 2)])
            classes.append("published")
    return header, rows, classes


def scores_section(entries: Sequence[Entry]) -> Markup:
    """The table, and bars of the headline numbers."""
    header, rows, classes = score_rows(entries)
    settings = entries[0].result.settings
    drawn = []
    for metric in headlines(entry.result.scores for entry in entries):
        if metric.unit != "%":  # the bars end at 100
            continue
        numbers = [(entry.label, entry.result.scores.number(metric)) for entry in entries]
        # A row for each, also without a number: places decide the colours.
        rows_drawn = [(label, n.value, n.low, n.high) if n else (label, None, None, None) for label, n in numbers]
        shown = bars(metric.title, rows_drawn)
        has_intervals = any(low is not None for _, _, low, _ in rows_drawn)
        drawn.append(figure(shown, f"{metric.label}{', with 95 % intervals' if has_intervals else ''}."))
    lone = any(entry.result.scores.lack_interval for entry in entries)
    text = (
        f"Percent{_interval_words(settings, lone)}. paper: the published scripts' numbers, faults "
        "included; open is recall, closed is accuracy, and a closed answer is right wherever the reference's letters "
        'stand in it: a no also in "nodule". strict: whole words counted once, yes or no only where the answer says '
        "one of them. Published rows were made with the paper set."
    )
    return table(header, rows, classes) + _warnings(entries) + figures(*drawn) + note(text)


def _interval_words(settings: dict[str, Any], lone: bool) -> str:
    if not settings["resamples"]:
        return ""
    alone = "; a single one gives one of 0 and 100 alone" if lone else ""
    return f" with 95 % bootstrap intervals (resampled {settings['unit']}s{alone})"


def _warnings(entries: Sequence[Entry]) -> Markup:
    """What an evaluation says of its files, and which hold answers that ended at the limit of tokens, by their
    manifests."""
    parts = []
    for entry in entries:
        words = [*entry.result.remarks]
        manifest = entry.result.manifest or {}
        counts = manifest.get("counts") or {}
        if cut := counts.get("cut_at_max_new_tokens"):
            limit = (manifest.get("decoding") or {}).get("max_new_tokens")
            asked = counts.get("questions", entry.result.asked)
            words.append(f"{cut:,} of {asked:,} answers were cut at the limit of {f'{limit} ' if limit else ''}tokens.")
        parts += [warning(f"{entry.label}: {line}") for line in words]
    return Markup().join(parts)


SIGNIFICANT = 0.05
"""A p value below it says that there is a difference."""


def differences_section(entries: Sequence[Entry]) -> Markup:
    """Each pair of files that answer the same questions: the paired difference, and what it says."""
    rows, remarks = [], []
    for first, second in combinations(entries, 2):
        if first.questions != second.questions:
            continue
        compared = compare_evaluations(first.result, second.result)
        remarks += _shared(first, second, compared)
        for metric, found in compared.numbers.items():
            mcnemar = "" if found.mcnemar_p is None else p_text(found.mcnemar_p)
            said = _direction(first, second, metric, found)
            rows.append([first.label, second.label, metric.heading, *comparison_cells(metric, found), mcnemar, said])
    if not rows:
        return Markup()
    header = ["first", "second", "metric", "first", "second", "difference", "p (bootstrap)", "p (McNemar)", "it says"]
    text = (
        "The difference is the second's score minus the first's, on the same questions, with its 95 % interval. Each p "
        "stands for one comparison: of twenty without a difference, one falls below 0.05 by chance. A model is called "
        "better where the interval is on one side of 0 and McNemar's exact test, where there is one, is below 0.05 too."
    )
    return table(header, rows) + Markup().join(remarks) + note(text)


def _shared(first: Entry, second: Entry, compared: AnswerComparison) -> list[Markup]:
    """Which questions two files are compared on, where it isn't all."""
    return [warning(f"{first.label} and {second.label}: {compared.remark}")] if compared.remark else []


def _direction(first: Entry, second: Entry, metric: Metric, found: Comparison) -> str:
    if found.low is None or found.high is None:
        return "nothing: a single one is compared"
    if found.low <= 0 <= found.high:
        return "no difference is shown"
    if found.mcnemar_p is not None and found.mcnemar_p >= SIGNIFICANT:
        return "the two tests disagree: too few questions"
    is_second = (found.difference > 0) == metric.higher_is_better
    return f"{(second if is_second else first).label} is better"


def ablation_section(entries: Sequence[Entry]) -> Markup:
    """What is left of each score without the image, with the paired difference to the answers with it."""
    rows, remarks = [], []
    for base in (entry for entry in entries if entry.ablation == "none"):
        for other in ablations_of(base, entries):
            compared = compare_evaluations(base.result, other.result)
            remarks += _shared(base, other, compared)
            for metric, found in compared.numbers.items():
                rows.append([base.label, other.ablation, metric.heading, *comparison_cells(metric, found)])
    if not rows:
        return Markup()
    header = ["model", "images", "metric", "with images", "ablated", "difference", "p (paired bootstrap)"]
    text = "A model that looks at the image loses much; one that guesses loses nothing."
    return table(header, rows) + Markup().join(remarks) + note(text)


def memory_section(entries: Sequence[Entry]) -> Markup:
    """What each model adds to answers from memory of the training questions, with paired intervals."""
    rows, remarks = [], []
    for memory in (entry for entry in entries if entry.is_memory):
        for model in entries:
            if model.is_memory or model.ablation != "none" or model.questions != memory.questions:
                continue
            compared = compare_with_memory(model.result, memory.result)
            remarks += _shared(model, memory, compared)
            for metric, found in compared.numbers.items():
                rows.append([model.label, memory.label, metric.heading, *comparison_cells(metric, found)])
    if not rows:
        return Markup()
    header = ["model", "memory", "metric", "model's", "memory's", "the model adds", "p (paired bootstrap)"]
    text = "Memory answers with what training says to the most similar questions: no model is asked."
    return table(header, rows) + Markup().join(remarks) + note(text)


def ablations_of(base: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """Ablated answers of the same checkpoint to the same questions."""

    def key(entry: Entry) -> tuple:
        manifest = entry.result.manifest or {}
        checkpoint = manifest.get("checkpoint_digest") or manifest.get("checkpoint")
        return checkpoint, str(entry.questions)

    return [entry for entry in entries if entry.ablation != "none" and key(entry) == key(base)]


def calibration_section(entries: Sequence[Entry]) -> Markup:
    """Reliability of yes and no by token probabilities."""
    found = [(entry.label, entry.result.calibration) for entry in entries if entry.result.calibration]
    if not found:
        return Markup()
    drawn = [figure(reliability(label, one.bins), f"{label}: {calibration_line(one)}") for label, one in found]
    text = "Each point holds as many answers as it says; below the line a model is surer than it is right."
    return figures(*drawn) + note(text)


def groups_section(entries: Sequence[Entry]) -> Markup:
    """Headline numbers by question type, organ, …"""
    parts = []
    for entry in entries:
        for name, groups in entry.result.scores.groups.items():
            shown, kinds = headlines([entry.result.scores]), kinds_of([entry.result.scores])
            rows = [
                [key, *(str(row[kind]) for kind in kinds), *(plain(row[metric.title]) for metric in shown)]
                for key, row in groups.items()
            ]
            parts.append(subheading(f"{entry.label}, by {name}"))
            header = [name, *(f"{kind} questions" for kind in kinds), *(metric.heading for metric in shown)]
            parts.append(table(header, rows))
    return Markup().join(parts)


def confusions_section(entries: Sequence[Entry]) -> Markup:
    """What is answered where the reference says yes and where it says no, by type of question."""
    parts = []
    for entry in entries:
        counts: dict[str, Counter] = {}
        for joined in entry.result.joined:
            wanted = reference_polarity(joined.item.answer)
            if joined.item.answer_type == CLOSED and wanted in {"yes", "no"}:
                said = reference_polarity(joined.prediction)
                counts.setdefault(_kind(joined), Counter())[wanted, said if said in {"yes", "no"} else "other"] += 1
        if not counts:
            continue
        rows = [[kind, *(f"{found[cell]:,}" for cell in _CONFUSIONS)] for kind, found in sorted(counts.items())]
        if len(rows) > 1:
            total = sum(counts.values(), Counter())
            rows.append(["all", *(f"{total[cell]:,}" for cell in _CONFUSIONS)])
        header = ["type of question", *(f"{wanted}, answered {said}" for wanted, said in _CONFUSIONS)]
        parts += [subheading(entry.label), table(header, rows)]
    if not parts:
        return Markup()
    return Markup().join(parts) + note("Questions whose reference says yes or no; other: both of them, or neither.")


def _kind(joined: JoinedItem) -> str:
    """The type that its record gives a question, else open or closed."""
    fields = joined.item.fields
    return str(next((fields[name] for name in _TYPES if fields.get(name)), joined.item.answer_type)).strip().lower()


def audit_section(clean: Sequence[tuple[str, CleanScores]], others: Sequence[str] = ()) -> Markup:
    """What training has seen of the test set, and the scores on what it hasn't."""
    if not clean:
        return Markup()
    from llava.data.audit_text import audit_lines

    rows = []
    shown = headlines(scores.all_questions for _, scores in clean)
    kinds = kinds_of(scores.all_questions for _, scores in clean)
    for label, scores in clean:
        for name, part in (("all", scores.all_questions), *scores.subsets.items()):
            cells = ["no question"] * len(shown) if part is None else [number_cell(part.number(m)) for m in shown]
            rows.append([label, name, " / ".join(count_cells(part, kinds)), *cells])
    header = ["model", "test questions", " / ".join(kinds), *(metric.heading for metric in shown)]
    left = note(f"The audit is of other questions than those of {', '.join(others)}.") if others else Markup()
    return preformatted(audit_lines(clean[0][1].audit)) + table(header, rows) + left


def examples_section(entries: Sequence[Entry], image_folder: str | Path | None, each: int = 4, seed: int = 0) -> Markup:
    """A random sample of right and wrong answers, of every kind of question, with images where a folder is given."""
    parts = []
    for entry in entries:
        values = entry.result.scores.values
        columns = [values["strict"]["closed accuracy"], values["strict"]["open recall"]]
        columns += [values["further"]["choice accuracy"]] if "choice accuracy" in values["further"] else []
        right: list[JoinedItem] = []
        wrong: list[JoinedItem] = []
        for joined, *scores in zip(entry.result.joined, *columns, strict=True):
            score = next((score for score in scores if score is not None), None)
            if score in (0, 1):
                (right if score else wrong).append(joined)
        chosen = random.Random(seed)
        shown = []
        for pool, is_right in ((right, True), (wrong, False)):
            for joined in chosen.sample(pool, min(each, len(pool))):
                item = joined.item
                image = _image(item.images, image_folder or (entry.result.manifest or {}).get("image_folder"))
                shown.append(Card(image, item.question, str(item.answer), joined.prediction, is_right, _kind(joined)))
        parts.append(subheading(f"{entry.label}: {len(right)} wholly right, {len(wrong)} wholly wrong (strict)"))
        parts.append(gallery(shown, entry.label))
    return Markup().join(parts)


def provenance_section(entries: Sequence[Entry]) -> Markup:
    """What produced each answer file."""
    rows = []
    for entry in entries:
        manifest = entry.result.manifest or {}
        versions = ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items())
        checksum = (manifest.get("sha256") or "")[:16]
        rows.append([entry.label, str(entry.result.pred), describe(entry.result.manifest), versions, checksum])
    answers = table(["model", "answers", "produced by", "versions", "sha256 of the answers"], rows)
    settings = [
        f"{entry.label}: {json.dumps({name: (entry.result.manifest or {}).get(name) for name in _RUN})}"
        for entry in entries
    ]
    scoring = f"scores: {json.dumps(entries[0].result.settings)}"
    return answers + folded("Settings, checkpoints, templates, data", preformatted([*settings, scoring]))


def _image(images: Sequence[Any], folder: str | Path | None):
    """The first of a question's images, as the model was shown it, if it is a file of the folder."""
    name = image_file(images[0]) if images else None
    if not isinstance(name, str) or not folder:
        return None
    path = Path(folder) / name
    return open_image(with_options_of(images[0], path)) if is_file(path) else None
