"""One page from any number of answer files: scores next to the paper's, intervals, what the images add, examples.

Writes a self-contained HTML page and the score table as Markdown. Answers of the same checkpoint with
--ablate-image are put next to those with images by their manifests.

python -m llava.eval.report --pred ours=answers.jsonl grey=answers-blank.jsonl --output report.html
"""

from collections import Counter
from pathlib import Path

from llava.commandline import ArgumentParser, check_outputs, existing_dir, existing_file, run, write_line
from llava.errors import LlavaError
from llava.eval.scoring_flags import add_scoring_flags


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pred", nargs="+", required=True, metavar="[NAME=]FILE", help="answer files; NAME is the row in the tables"
    )
    parser.add_argument("--gt", nargs="+", help="questions: one file, or one per --pred (default: the manifests')")
    parser.add_argument("--output", default="report.html", help="the page; the table goes next to it as .md")
    parser.add_argument("--title", default="Medical visual question answering", help="heading of the page")
    parser.add_argument("--image-folder", help="images, for the examples")
    parser.add_argument("--candidate", help="open answers of the training split")
    parser.add_argument("--audit", help="what llava-med audit --output wrote")
    parser.add_argument("--examples", type=int, default=4, help="right and wrong ones of each answer file")
    add_scoring_flags(parser, seed="of the bootstrap and of the examples")
    parser.add_bool("--pdf", help="write the page as a PDF too, by a browser that is installed")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.examples < 0:
        raise LlavaError(f"--examples is {args.examples}; give 0 or more")
    if args.image_folder:
        existing_dir(args.image_folder, "--image-folder")
    from llava.eval.reports.evaluation import evaluate
    from llava.eval.reports.sections import Entry
    from llava.pages import print_page, printing_browser

    browser = printing_browser() if args.pdf else None
    pdf = Path(args.output).with_suffix(".pdf")
    if browser and pdf.exists() and not (Path(args.output).exists() or args.overwrite):
        raise LlavaError(f"{pdf} is there and isn't of this page; give another name, or --overwrite to replace it")
    named = [_label_and_file(text) for text in args.pred]
    check_outputs(args, [*(file for _, file in named), *(args.gt or ()), args.candidate, args.audit], "output")
    labels = Counter(label for label, _ in named)
    if doubled := [label for label, count in labels.items() if count > 1]:
        raise LlavaError(f"--pred: {labels[doubled[0]]} files are called {doubled[0]!r}; give each a name: NAME=FILE")
    entries = [
        Entry(
            label,
            evaluate(
                gt,
                file,
                args.candidate,
                on_missing=args.on_missing,
                resamples=args.bootstrap_samples,
                unit=args.bootstrap_unit,
                seed=args.seed,
            ),
        )
        for (label, file), gt in zip(named, _questions(args.gt, [file for _, file in named]))
    ]
    page, markdown = write_report(
        entries,
        args.output,
        title=args.title,
        image_folder=args.image_folder,
        audit=args.audit and existing_file(args.audit, "--audit"),
        examples=args.examples,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    write_line(f"{page}\n{markdown}")
    if browser is not None:
        write_line(str(print_page(page, browser)))


def write_report(
    entries: list,
    output: str | Path,
    *,
    title: str = "Medical visual question answering",
    image_folder: str | Path | None = None,
    audit: str | Path | None = None,
    examples: int = 4,
    seed: int = 0,
    overwrite: bool = True,
) -> tuple[Path, Path]:
    """Write the page and the Markdown table of `Entry`s; returns the two paths.

    Args:
        audit: JSON of `llava.data.audit`, for the files that answer its questions.
        overwrite: replace another page that is there.
    """
    from llava.eval.reports import sections
    from llava.eval.reports.clean_subset import check_audited, not_audited, read_audit, score_clean_subset
    from llava.eval.reports.tables import markdown_table
    from llava.pages import write_page
    from llava.records import atomic_path, written_together

    if not entries:
        raise LlavaError("a report needs at least one answer file")
    plain = [entry for entry in entries if entry.ablation == "none"] or entries
    clean, others = [], []
    if audit:
        audited = read_audit(audit)
        for entry in plain:
            if not_audited(entry.result, audited):
                others.append(entry.label)
            else:
                clean.append((entry.label, score_clean_subset(entry.result, audited, audit)))
        if not clean:
            check_audited(plain[0].result, audited, audit)
    questions = len(entries), sum(entry.result.scores.questions for entry in entries)
    page = Path(output)
    markdown = page.with_suffix(".md")
    if page == markdown:
        raise LlavaError(f"--output {page}: the table goes there; give the page a name that ends in .html")
    header, rows, _ = sections.score_rows(entries)
    with written_together():
        with atomic_path(markdown, overwrite=overwrite) as temporary:
            temporary.write_text(f"# {title}\n\n{markdown_table(header, rows)}\n", encoding="utf-8")
        write_page(
            page,
            title,
            f"answer files: {questions[0]}, answers: {questions[1]:,}",
            [
                ("Scores", sections.scores_section(entries)),
                ("Differences between models", sections.differences_section(plain)),
                ("Does it look at the image?", sections.ablation_section(entries)),
                ("What does it add to memory?", sections.memory_section(entries)),
                ("Is it as sure as it is right?", sections.calibration_section(plain)),
                ("Is the test set clean?", sections.audit_section(clean, others)),
                ("By kind of question", sections.groups_section(plain)),
                ("Yes and no", sections.confusions_section(plain)),
                ("Examples", sections.examples_section(plain, image_folder, examples, seed)),
                ("What produced the answers", sections.provenance_section(entries)),
            ],
            overwrite=overwrite,
        )
    return page, markdown


def _label_and_file(text: str) -> tuple[str, Path]:
    label, equals, file = text.partition("=")
    if equals and not Path(text).exists():
        return label, existing_file(file, "--pred")
    path = existing_file(text, "--pred")
    return path.parent.name + "/" + path.stem if path.parent.name else path.stem, path


def _questions(given: list[str] | None, files: list[Path]) -> list[Path]:
    """The questions of each answer file."""
    from llava.eval.answers.manifest import questions_of

    if given and len(given) not in (1, len(files)):
        raise LlavaError(f"--gt has {len(given)} files for {len(files)} of --pred; give one, or one for each")
    if given:
        return [existing_file(path, "--gt") for path in (given * len(files) if len(given) == 1 else given)]
    return [questions_of(file) for file in files]


if __name__ == "__main__":
    run(main)
