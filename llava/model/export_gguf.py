"""Write a LLaVA checkpoint as the two GGUF files that llama.cpp, Ollama and LM Studio load.

One holds the language model, whole or quantized, the other vision tower and projector.

python -m llava.model.export_gguf --model-path CHECKPOINT --output FOLDER --type q8_0
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", "--src", required=True, help="checkpoint: folder or hub id")
    parser.add_argument("--model-base", help="base model of a LoRA or projector folder")
    parser.add_argument("--output", "--dst", "--save-model-path", required=True, help="folder for the two files")
    parser.add_argument(
        "--vision-tower", help="vision tower (folder or hub id) in place of the config's mm_vision_tower"
    )
    parser.add_argument("--type", choices=["f32", "f16", "q8_0", "q4_0"], default="f16", help="of the language model")
    parser.add_argument(
        "--class-token",
        choices=["first", "last"],
        default="last",
        help="where the program that loads the files puts the tower's class token: last is the llama.cpp of today",
    )
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.errors import require

    require("gguf", "gguf")
    from llava.model.gguf.writer import export_gguf

    output = export_gguf(
        args.model_path,
        args.output,
        args.model_base,
        vision_tower=args.vision_tower,
        kind=args.type,
        class_token=args.class_token,
        overwrite=args.overwrite,
    )
    write_line(f"{output}: complete, language model in {args.type}")


if __name__ == "__main__":
    run(main)
