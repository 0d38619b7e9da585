"""Sum up judged chat answers: relative scores by question type and domain, of one or several scores files.

python -m llava.eval.summarize_gpt_review --scores-file scores.jsonl [--scores-file other.jsonl]
"""

from llava.commandline import ArgumentParser, run, write_line
from llava.eval.eval_multimodal_chat_gpt_score import DEFAULT_SCORES


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scores-file",
        action="append",
        default=None,
        help=f"what the scorer wrote; several stand side by side (default: {DEFAULT_SCORES})",
    )
    parser.add_argument("--json", help="also write the numbers here")
    return parser


def main(argv=None) -> int:
    from llava.eval.chat.summary import read_scores_file, summary_table
    from llava.records import write_json

    args = build_parser().parse_args(argv)
    judged = [read_scores_file(path) for path in args.scores_file or [DEFAULT_SCORES]]
    write_line(summary_table(judged))
    if args.json:
        write_json(args.json, [one.as_dict() for one in judged])
    return 0


if __name__ == "__main__":
    run(main)
