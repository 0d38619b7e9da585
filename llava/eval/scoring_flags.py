"""The flags of every command that scores answer files: unanswered questions and the bootstrap."""

from llava.commandline import ArgumentParser

RESAMPLES = 10_000


def add_scoring_flags(parser: ArgumentParser, *, unit: bool = True, seed: str = "of the bootstrap") -> None:
    """--on-missing, --bootstrap-samples, --seed and, with `unit`, --bootstrap-unit. `seed` says what that is of."""
    parser.add_argument(
        "--on-missing",
        choices=("error", "skip", "wrong"),
        default="error",
        help="a question without answer: stop, leave it out, or count it as an empty answer",
    )
    parser.add_argument("--bootstrap-samples", type=int, default=RESAMPLES, help="0 leaves intervals out")
    if unit:
        parser.add_argument(
            "--bootstrap-unit", choices=("question", "image"), default="question", help="what the bootstrap draws"
        )
    parser.add_argument("--seed", type=int, default=0, help=seed)
