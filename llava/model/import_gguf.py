"""Write a language model's GGUF file as a folder that training, loading and answering take.

Of LLaMA's architecture; quantized weights are unpacked. Tokenizer and prompt template come from the file.

python -m llava.model.import_gguf --model-path FILE.gguf --output FOLDER
"""

from llava.commandline import ArgumentParser, existing_file, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", "--src", required=True, help="the file, whole or quantized (.gguf)")
    parser.add_argument("--output", "--dst", "--save-model-path", required=True, help="folder for the result")
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="default: the file's own, float32 if it is quantized",
    )
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    source = existing_file(args.model_path, "--model-path")
    from llava.errors import require

    require("gguf", "gguf")
    import torch

    from llava.model.gguf.reader import import_gguf

    dtype = getattr(torch, args.dtype) if args.dtype else None
    output = import_gguf(source, args.output, dtype=dtype, overwrite=args.overwrite)
    write_line(f"{output}: complete and verified")


if __name__ == "__main__":
    run(main)
