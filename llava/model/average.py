"""Average the weights of checkpoints that were trained from the same one, as one whole folder.

Runs in another order, or the last steps of one run, often answer better as their mean than each alone (Wortsman et al.,
"Model soups", 2022), at the cost of a single model. Tensor by tensor; configuration and tokenizer are the first's.

python -m llava.model.average --models CHECKPOINT OTHER --output FOLDER
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="CHECKPOINT",
        help="two or more, of any layout: folders or hub ids",
    )
    parser.add_argument("--output", required=True, help="folder for the result")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if len(args.models) < 2:
        parser.error("--models: give two checkpoints or more")
    from llava.model.convert.native_writer import write_native

    output = write_native(
        args.models[0],
        args.output,
        description=f"The mean of the weights of {len(args.models)} checkpoints.",
        averaged_with=args.models[1:],
        overwrite=args.overwrite,
    )
    write_line(f"{output}: the mean of {len(args.models)} checkpoints, complete and verified")


if __name__ == "__main__":
    run(main)
