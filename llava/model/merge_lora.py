"""Merge a LoRA folder (adapter, projector and whatever else was trained) into its base: one whole checkpoint.

Without --model-base it is the base that the adapter was trained on, as recorded with it.

python -m llava.model.merge_lora --model-path LORA --model-base BASE --save-model-path FOLDER
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="the LoRA folder or hub id")
    parser.add_argument("--model-base", help="the model that it was trained over (default: as the adapter records)")
    parser.add_argument("--save-model-path", "--output", required=True, help="folder for the result")
    parser.add_argument("--vision-tower", help="folder or hub id in place of the config's mm_vision_tower")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: the base's")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import torch

    from llava.errors import LlavaError
    from llava.model.checkpoint.adapter import ADAPTER_CONFIG
    from llava.model.convert.native_writer import write_native
    from llava.model.weights.locate import locate_model

    folder = locate_model(args.model_path, "LoRA folder")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise LlavaError(f"{folder}: no {ADAPTER_CONFIG}, so this is no LoRA folder; there is nothing to merge")
    output = write_native(
        folder,
        args.save_model_path,
        args.model_base,
        description="A LLaVA checkpoint, its LoRA adapter merged into the base.",
        vision_tower=args.vision_tower,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        overwrite=args.overwrite,
    )
    write_line(f"{output}: complete and verified")


if __name__ == "__main__":
    run(main)
