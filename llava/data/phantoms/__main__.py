"""Draw the built-in set of images with their captions, conversations and questions.

Simple shapes that stand for findings: no image is of a patient, and any number of them takes a few seconds.

python -m llava.data.phantoms --output-dir data/phantoms --train 500 --test 50 --conversations 100 --vqa 100 --text 500
"""

from llava.commandline import ArgumentParser, run, write_line
from llava.data.phantoms.build import Counts, write_phantoms


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another set: no image is shared")
    parser.add_argument("--train", type=int, default=Counts.train, help="training images")
    parser.add_argument("--test", type=int, default=Counts.test, help="held-out images")
    parser.add_argument(
        "--conversations", type=int, default=Counts.conversations, help="training images with a conversation"
    )
    parser.add_argument("--vqa", type=int, default=Counts.vqa, help="training images with VQA questions")
    parser.add_argument("--text", type=int, default=Counts.text, help="conversations without an image")
    parser.add_argument("--rounds", type=int, default=Counts.rounds, help="versions of each conversation")
    parser.add_argument("--size", type=int, default=96, help="pixels per side")
    parser.add_argument("--processes", type=int, default=2, help="how many draw")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    counts = Counts(args.train, args.test, args.conversations, args.vqa, args.text, args.rounds)
    written = write_phantoms(
        args.output_dir, args.seed, counts, size=args.size, processes=args.processes, overwrite=args.overwrite
    )
    write_line(f"wrote {args.output_dir}: " + ", ".join(f"{count} in {name}" for name, count in written.items()))


if __name__ == "__main__":
    run(main)
