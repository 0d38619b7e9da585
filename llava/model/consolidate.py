"""Rewrite a checkpoint as one whole folder: safetensors, complete config, tokenizer, vision tower inside.

Tensor by tensor, so that memory for the largest is enough; what was written is read again and compared.

python -m llava.model.consolidate --src CHECKPOINT --dst FOLDER
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--src", required=True, help="checkpoint of any layout: folder or hub id")
    parser.add_argument("--dst", required=True, help="folder for the result")
    parser.add_argument("--model-base", help="base model of a LoRA or projector folder")
    parser.add_argument("--vision-tower", help="folder or hub id in place of the config's mm_vision_tower")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: each tensor's own")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import torch

    from llava.model.convert.native_writer import write_native

    output = write_native(
        args.src,
        args.dst,
        args.model_base,
        description="A LLaVA checkpoint, complete in itself.",
        vision_tower=args.vision_tower,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        overwrite=args.overwrite,
    )
    write_line(f"{output}: complete and verified")


if __name__ == "__main__":
    run(main)
