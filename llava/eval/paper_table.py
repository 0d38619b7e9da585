"""The paper's table next to ours: in each cell the expected value, our value and the tolerance.

The tolerance is one standard error of a score on that number of questions: the published decoding was random and
its seed unknown.

python -m llava.eval.paper_table --results fine-tuned:vqa-rad=scores.json --output table.md
"""

from dataclasses import dataclass
from pathlib import Path

from llava.commandline import ArgumentParser, check_outputs, existing_file, run, write_line
from llava.errors import LlavaError, amount

ROWS = {"fine-tuned": "released weights, 9 epochs", "zero-shot": "LLaVA-Med zero-shot"}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results",
        nargs="+",
        required=True,
        metavar="ROW:SET=FILE",
        help="results of run_eval --output; ROW is fine-tuned or zero-shot, SET vqa-rad, slake or pathvqa",
    )
    parser.add_argument("--output", help="write the table here too (Markdown)")
    parser.add_bool("--fail-when-off", help="exit code 1 if a cell is outside its tolerance")
    parser.add_overwrite()
    return parser


@dataclass(frozen=True)
class Cell:
    """One number of the table, percent."""

    row: str
    dataset: str
    expected: float
    ours: float | None
    questions: int
    published_questions: int
    missing: int = 0
    """Answers of the file (of either kind) that are missing."""

    @property
    def tolerance(self) -> float:
        """One standard error of a share of the size published, over the questions published."""
        share = self.expected / 100
        return 100 * (share * (1 - share) / self.published_questions) ** 0.5

    @property
    def is_within(self) -> bool:
        return self.ours is not None and abs(self.ours - self.expected) <= self.tolerance

    def text(self) -> str:
        ours = "no question" if self.ours is None else f"{self.ours:.2f}"
        verdict = "ok" if self.is_within else "off"
        if self.questions != self.published_questions:
            verdict += f", {amount(self.questions, 'question')} instead of {self.published_questions}"
        if self.missing:
            verdict += f", {amount(self.missing, 'answer')} of the file missing"
        return f"{self.expected:.2f} / {ours} ± {self.tolerance:.2f} ({verdict})"


def main(argv: list[str] | None = None) -> int | None:
    args = build_parser().parse_args(argv)
    from llava.eval.reports.published import DATASET_NAMES
    from llava.eval.reports.tables import markdown_table
    from llava.records import atomic_path

    check_outputs(args, [text.partition("=")[2] for text in args.results], "output")
    by_row: dict[tuple[str, str], list[Cell]] = {}
    for text in args.results:
        open_cell, closed_cell = read_cells(text)
        place = open_cell.row, open_cell.dataset
        if place in by_row:
            raise LlavaError(f"--results: {':'.join(place)} stands more than once; give one file for it")
        by_row[place] = [open_cell, closed_cell]
    cells = [cell for pair in by_row.values() for cell in pair]
    header = ["", "data set", "open: expected / ours ± tolerance", "closed: expected / ours ± tolerance"]
    rows = [[row, DATASET_NAMES[name], *(cell.text() for cell in pair)] for (row, name), pair in by_row.items()]
    table = markdown_table(header, rows)
    if args.output:
        with atomic_path(Path(args.output), overwrite=args.overwrite) as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
    write_line(table)
    within = sum(cell.is_within for cell in cells)
    write_line(f"\n{within} of {len(cells)} cells within tolerance (one standard error; paper metric set, percent)")
    return int(args.fail_when_off and within < len(cells))


def read_cells(text: str) -> list[Cell]:
    """The open and closed cell of one `ROW:SET=FILE`.

    Raises:
        LlavaError: it names no cell, or the file holds no result, or one by the rules of another script.
    """
    from llava.eval.metrics.registry import PAPER_SCRIPTS, headline_name
    from llava.eval.reports.published import PUBLISHED, TEST_COUNTS
    from llava.records import read_json

    place, equals, file = text.partition("=")
    row, _, dataset = place.partition(":")
    if not equals or row not in ROWS or dataset not in PUBLISHED:
        raise LlavaError(
            f"--results {text}: expected ROW:SET=FILE with ROW {' or '.join(ROWS)}, SET {', '.join(PUBLISHED)}"
        )
    content = read_json(existing_file(file, "--results"))
    try:
        values = [content["paper"][headline_name("paper", kind)]["value"] for kind in ("open", "closed")]
        counts = [int(content[kind]) for kind in ("open", "closed")]
        script = content.get("settings", {}).get("script", PAPER_SCRIPTS[0])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LlavaError(f"{file}: not a result of run_eval --output") from error
    if script != PAPER_SCRIPTS[0]:
        raise LlavaError(f"{file}: scored by {script}'s rules; the published table is {PAPER_SCRIPTS[0]}'s (--script)")
    published = next(found for found in PUBLISHED[dataset] if found.model == ROWS[row])
    return [
        Cell(
            row=row,
            dataset=dataset,
            expected=getattr(published, kind),
            ours=value,
            questions=count,
            published_questions=published_count,
            missing=content.get("missing_answers") or 0,
        )
        for kind, value, count, published_count in zip(("open", "closed"), values, counts, TEST_COUNTS[dataset])
    ]


if __name__ == "__main__":
    run(main)
