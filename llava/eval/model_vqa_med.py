"""Answer the first question of each LLaVA-Med record: batched, greedy by default, resumable after a kill.

Answers go to --answers-file in the order of the questions, with a manifest of what made them next to it.

python -m llava.eval.model_vqa_med --model-path CHECKPOINT --question-file test.json --image-folder images \\
    --answers-file answers.jsonl
"""

from llava.commandline import ArgumentParser, run, write_line
from llava.eval.answers.command import add_answer_flags, add_api_answer_flags, run_answer_command


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add_answer_flags(parser)
    parser.add_argument("--chunk-idx", type=int, default=0, help="which part of --num-chunks to answer, from 0")
    add_api_answer_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.eval.answers.questions import read_med_questions

    write_line(str(run_answer_command(args, read_med_questions)))


if __name__ == "__main__":
    run(main)
