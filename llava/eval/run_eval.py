"""Score an answer file: the *paper* and *strict* metric sets side by side, with intervals and what made it.

docs/metrics.md defines the numbers. Input that doesn't fit together is an error and prints no number.

python -m llava.eval.run_eval --gt test.json --pred answers.jsonl --output scores.json
"""

from pathlib import Path

from llava.commandline import ArgumentParser, check_outputs, existing_dir, existing_file, run, write_line
from llava.errors import LlavaError
from llava.eval.scoring_flags import add_scoring_flags


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--gt", required=True, help="questions with answers: LLaVA-Med records or raw VQA-RAD")
    parser.add_argument("--pred", required=True, help="answer file (JSONL)")
    parser.add_argument("--candidate", help='open answers of the training split: {"0": [answer, …]}')
    parser.add_argument("--compare", help="a second answer file: paired comparison with --pred")
    parser.add_argument(
        "--memory", help="answers of llava.eval.baselines: a row beside --pred's, and what it adds to them"
    )
    parser.add_argument("--output", help="write all numbers here (JSON)")
    parser.add_argument("--per-item", help="write one line per question here (JSONL)")
    parser.add_argument(
        "--group-by", nargs="*", help="record fields to give tables for (default: those with few values)"
    )
    parser.add_argument(
        "--script",
        choices=("run_eval_batch", "run_eval", "run_eval_pvqa"),
        default="run_eval_batch",
        help="the published script whose rules the paper set follows (the published table's: run_eval_batch)",
    )
    add_scoring_flags(parser)
    parser.add_argument(
        "--audit",
        nargs="?",
        const="",
        metavar="FILE",
        help="score the clean part too: the audit's JSON, or nothing and --train (with --image-folder)",
    )
    parser.add_argument("--train", help="training questions, to audit against")
    parser.add_argument("--image-folder", help="images of both splits, for the audit")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for flag, value in (("--train", args.train), ("--image-folder", args.image_folder)):
        if value is not None and args.audit != "":
            raise LlavaError(f"{flag} is for an audit that is made here; give --audit without a file too")
    read = [args.gt, args.pred, args.candidate, args.compare, args.memory, args.audit, args.train]
    check_outputs(args, read, "output", "per_item")
    if args.image_folder:
        existing_dir(args.image_folder, "--image-folder")
    from llava.eval.reports.evaluation import evaluate
    from llava.records import write_json, write_records, written_together

    result = evaluate(
        gt=existing_file(args.gt, "--gt"),
        pred=existing_file(args.pred, "--pred"),
        candidate=args.candidate,
        on_missing=args.on_missing,
        script=args.script,
        group_by=args.group_by,
        resamples=args.bootstrap_samples,
        unit=args.bootstrap_unit,
        seed=args.seed,
    )
    sections = [result.text()]
    content = result.as_dict()
    if args.audit is not None:
        from llava.eval.reports.clean_subset import audit_against, read_audit, score_clean_subset

        audit = read_audit(args.audit) if args.audit else audit_against(result, args.train, args.image_folder)
        clean = score_clean_subset(result, audit, args.audit)
        sections.append(clean.text())
        content["clean_subset"] = clean.as_dict()
    if args.compare or args.memory:
        from llava.eval.reports.compare import compare_evaluations, compare_with_memory, evaluate_alike

        if args.compare:
            other = evaluate_alike(result, existing_file(args.compare, "--compare"))
            comparison = compare_evaluations(result, other)
            sections.append(comparison.text())
            content["comparison"] = comparison.as_dict()
        if args.memory:
            memory = evaluate_alike(result, existing_file(args.memory, "--memory"))
            comparison = compare_with_memory(result, memory)
            sections.append(comparison.text())
            content["memory"] = comparison.as_dict()
    write_line("\n\n".join(sections))
    with written_together():
        if args.output:
            write_json(Path(args.output), content, overwrite=args.overwrite)
        if args.per_item:
            write_records(Path(args.per_item), result.scores.rows, overwrite=args.overwrite)


if __name__ == "__main__":
    run(main)
