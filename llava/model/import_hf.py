"""Write transformers' `LlavaForConditionalGeneration` folder in the layout of LLaVA.

For tools that know LLaVA's layout alone: the commands here load either.

python -m llava.model.import_hf --model-path HF_CHECKPOINT --output FOLDER
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", "--src", required=True, help="checkpoint: folder or hub id")
    parser.add_argument("--output", "--dst", "--save-model-path", required=True, help="folder for the result")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.model.convert.hf_reader import import_hf

    output = import_hf(args.model_path, args.output, overwrite=args.overwrite)
    write_line(f"{output}: complete and verified")


if __name__ == "__main__":
    run(main)
