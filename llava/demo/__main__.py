"""Train, evaluate and compare small models on images drawn by the program: the full pipeline in a few minutes.

A language model and a vision tower are made from scratch, then come stage 1, stage 2 and VQA fine-tuning by the
training command, answers and scores, the same without seeing the images, and a page of all of it.
For research only, never for clinical use.

python -m llava.demo --small --output-dir runs/small
"""

import shutil
import sys
import time
from pathlib import Path

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="runs/demo", help="a rerun goes on at the first unfinished step")
    parser.add_argument("--seed", type=int, default=0, help="of images, models and training")
    parser.add_bool("--small", help="every step once, on 500 images, in a minute or two, learning next to nothing")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.constants import RESEARCH_NOTICE
    from llava.demo.report import NO_SCORES, write_report
    from llava.demo.scores import results, score_runs, table
    from llava.demo.settings import FULL, SMALL
    from llava.demo.steps import run_steps
    from llava.errors import LlavaError
    from llava.folders import check_target
    from llava.records import read_json, write_json

    output, settings = Path(args.output_dir), SMALL if args.small else FULL
    kind, note = {"seed": args.seed, "small": args.small}, output / "demo.json"
    if not note.is_file():
        check_target(output, args.overwrite)  # what isn't the demo's may lie under its names
    there = read_json(note) if note.is_file() else kind
    if there != kind and not args.overwrite:
        known = there if isinstance(there, dict) else {}
        raise LlavaError(
            f"{output}: holds the {'small' if known.get('small') else 'whole'} demo of seed {known.get('seed')}; name "
            f"another folder with --output-dir, or replace it with --overwrite"
        )
    write_json(note, kind)
    pipeline = run_steps(output, settings, args.seed)
    started = time.monotonic()
    scores = score_runs(output)
    pipeline.seconds["scores"] = time.monotonic() - started
    seconds = pipeline.total + pipeline.seconds["scores"]
    summary = results(scores if settings.claims_scores else {}, scores[""].finding.questions, seconds, args.seed)
    write_json(output / "results.json", summary)
    report = write_report(output, scores, summary, pipeline.seconds, settings.claims_scores)
    if settings.claims_scores:
        rows = table(scores)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    else:
        write_line(NO_SCORES)
    write_line(f"{summary['questions']} questions about findings on held-out images, seed {args.seed}, {seconds:.0f} s")
    write_line(f"report: {report}")
    write_line(f"model: {output / 'vqa'}")
    for line in what_comes_next(output):
        write_line(line)
    write_line(RESEARCH_NOTICE)


def what_comes_next(output: Path) -> list[str]:
    """Lines for whoever has just run the demo into `output`: the commands to go on with, and where they are found."""
    model = output / "vqa"
    page, chat = f"llava-med serve --model-path {model}", f"llava-med chat --model-path {model}"
    if output == Path("runs/demo") and Path("Makefile").is_file():
        page, chat = "make serve", "make chat"
    lines = [f"next: {page} (the page and the API), or {chat} (the terminal)"]
    environment = Path(sys.prefix)
    script = environment / "bin" / "activate"
    if shutil.which("llava-med") is None and script.is_file():
        here = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
        lines.append(f"before any other command: . {here}")
    return lines


if __name__ == "__main__":
    run(main)
