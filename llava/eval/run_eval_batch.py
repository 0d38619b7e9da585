"""Score every answer file below a folder, into eval_results_med_datasets.jsonl.

The questions of an answer file are those that its manifest names. Or --gt scores all files against one; or
--gt_parent_path holds a folder for each data set, which a part of the answer file's path names (`data_RAD`, `vqa_rad`,
`pvqa`, `Slake1.0`).

python -m llava.eval.run_eval_batch --pred_file_parent_path runs --target_test_type test-answer-file
"""

import logging
import re
from pathlib import Path

from llava.commandline import ArgumentParser, check_outputs, existing_dir, existing_file, run, write_line
from llava.errors import LlavaError, amount
from llava.eval.scoring_flags import add_scoring_flags

logger = logging.getLogger(__name__)

RESULTS_FILE = "eval_results_med_datasets.jsonl"
DATASET_PARTS = ("data_RAD", "vqa_rad", "pvqa", "Slake1.0")
TEST_TYPES = ("test-answer-file", "test_w_options-answer-file", "test_zh-answer-file", "test_with_options-answer-file")
_PART_NAME = re.compile(r"[-_.]chunk[-_]?\d+(-of-\d+)?$")
CANDIDATE_FILES = ("candidates.json", "candidate.json")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pred_file_parent_path", help="folder below which the answer files (*.jsonl) are")
    parser.add_argument(
        "--target_test_type",
        choices=TEST_TYPES,
        help="only answer files whose name holds this; questions are then test.json, test_w_options.json, …",
    )
    parser.add_argument("--gt_parent_path", help="folder that holds data_RAD/, vqa_rad/, pvqa/, Slake1.0/")
    parser.add_argument("--gt", help="questions of all answer files, in place of --gt_parent_path")
    parser.add_argument("--pred", help="one answer file, in place of --pred_file_parent_path")
    parser.add_argument("--candidate", help="open answers of the training split (default: next to the questions)")
    parser.add_argument("--output", default=RESULTS_FILE, help="results, one line per answer file")
    add_scoring_flags(parser, unit=False)
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    output = args.output = Path(args.output).with_suffix(".jsonl")
    files = answer_files(args.pred, args.pred_file_parent_path, args.target_test_type, output)
    questions = {pred: find_questions(pred, args.gt, args.gt_parent_path) for pred in files}
    check_outputs(args, [*files, *(gt for _, gt in questions.values()), args.candidate], "output")
    from llava.eval.metrics.score import headlines
    from llava.eval.reports.evaluation import evaluate
    from llava.eval.reports.tables import count_cells, kinds_of, number_cell, text_table
    from llava.records import write_records

    results = []
    for pred, (dataset, gt) in questions.items():
        result = evaluate(
            gt,
            pred,
            args.candidate or find_next_to(gt, CANDIDATE_FILES),
            on_missing=args.on_missing,
            group_by=(),
            resamples=args.bootstrap_samples,
            seed=args.seed,
        )
        results.append((dataset, result))
    rows = [{"dataset": dataset, **result.as_dict()} for dataset, result in results]
    # Scores of the same answer files may be new; those of others would be lost.
    write_records(output, rows, overwrite=args.overwrite or _files_in(output) <= {row["pred"] for row in rows})
    shown = headlines(result.scores for _, result in results)
    kinds = kinds_of(result.scores for _, result in results)
    header = ["answers", "data set", *kinds, *(metric.heading for metric in shown)]
    lines = []
    for dataset, result in results:
        scores = result.scores
        cells = [number_cell(scores.number(metric)) for metric in shown]
        lines.append([str(result.pred), dataset, *count_cells(scores, kinds), *cells])
    write_line(text_table(header, lines))
    for _, result in results:
        for remark in result.remarks:
            write_line(f"{result.pred}: {remark}")
    write_line(f"\n{len(rows)} answer files scored; all numbers: {output}")


def _files_in(results: Path) -> set[str | None]:
    """The answer files that a file of results is about; None where it is no such file."""
    from llava.records import iter_records

    if not results.is_file() or not results.stat().st_size:
        return set()
    found = (record.get("pred") for record in iter_records(results))
    return {pred if isinstance(pred, str) else None for pred in found}


def answer_files(
    pred: str | None, parent: str | None, test_type: str | None, results: Path = Path(RESULTS_FILE)
) -> list[Path]:
    """The answer files meant by the flags, in the order of their paths; `results` and parts of runs that aren't joined
    are left out, the parts with a word."""
    if pred is not None and parent is None:
        return [existing_file(pred, "--pred")]
    if pred is not None or parent is None:
        raise LlavaError("give --pred or --pred_file_parent_path (one of them)")
    found = [
        path
        for path in sorted(existing_dir(parent, "--pred_file_parent_path").rglob("*.jsonl"))
        if path.name != RESULTS_FILE and path.resolve() != results.resolve()
        if test_type is None or test_type in path.name
    ]
    parts = [path for path in found if _PART_NAME.search(path.stem)]
    if parts:
        logger.warning("left out: %s of runs that aren't joined, first %s", amount(len(parts), "part"), parts[0])
        found = [path for path in found if not _PART_NAME.search(path.stem)]
    if not found:
        wanted = f'"{test_type}" in the name' if test_type else ".jsonl"
        raise LlavaError(f"no answer file ({wanted}) below {parent}")
    return found


def find_questions(pred: Path, gt: str | None, gt_parent: str | None) -> tuple[str, Path]:
    """(data set, file of questions) of an answer file."""
    if gt is not None and gt_parent is not None:
        raise LlavaError("give --gt or --gt_parent_path, or none of them")
    parts = [part.lower() for part in pred.resolve().parts]
    dataset = next((name for name in DATASET_PARTS if any(name.lower() in part for part in parts)), None)
    if gt is not None:
        return dataset or Path(gt).parent.name, existing_file(gt, "--gt")
    if gt_parent is None:
        from llava.eval.answers.manifest import questions_of

        questions = questions_of(pred)
        return dataset or questions.parent.name, questions
    if dataset is None:
        raise LlavaError(f"{pred}: no part of the path names a data set ({', '.join(DATASET_PARTS)}); use --gt")
    folder = existing_dir(Path(gt_parent) / dataset, "questions of the data set")
    stem = next((name for name in TEST_TYPES if name in pred.name), TEST_TYPES[0]).removesuffix("-answer-file")
    file = find_next_to(folder / "x", [f"{stem}.json", f"{stem}.jsonl", f"{stem}.parquet"])
    if file is None:
        raise LlavaError(f"{folder}: no {stem}.json with the questions that {pred} answers")
    return dataset, file


def find_next_to(path: Path, names) -> Path | None:
    """The first of `names` that exists in the folder of `path`."""
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


if __name__ == "__main__":
    run(main)
