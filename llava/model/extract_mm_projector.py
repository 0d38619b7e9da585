"""Take the projector out of a checkpoint: `mm_projector.bin`, to start another training from.

Only its tensors are read, and the rows of the image tokens where they were trained.

python -m llava.model.extract_mm_projector --model-path CHECKPOINT --output mm_projector.bin
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model-path", "--model_name_or_path", required=True, help="checkpoint of any layout: folder or hub id"
    )
    parser.add_argument(
        "--output", required=True, help="a .bin or .safetensors file, or a folder (projector, config and card)"
    )
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.model.convert.projector_extract import extract_projector

    path, names = extract_projector(args.model_path, args.output, overwrite=args.overwrite)
    write_line(f"{path}: {', '.join(names)}")


if __name__ == "__main__":
    run(main)
