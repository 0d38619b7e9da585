"""Write a LLaVA checkpoint of any layout as transformers' `LlavaForConditionalGeneration`.

vLLM and llama.cpp's converter read that too; prompt template and image processing go along.

python -m llava.model.export_hf --model-path CHECKPOINT --output FOLDER
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", "--src", required=True, help="checkpoint: folder or hub id")
    parser.add_argument("--model-base", help="base model of a LoRA or projector folder")
    parser.add_argument("--output", "--dst", "--save-model-path", required=True, help="folder for the result")
    parser.add_argument(
        "--vision-tower", help="vision tower (folder or hub id) in place of the config's mm_vision_tower"
    )
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: each tensor's own")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import torch

    from llava.model.convert.hf_writer import export_hf

    output = export_hf(
        args.model_path,
        args.output,
        args.model_base,
        vision_tower=args.vision_tower,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        overwrite=args.overwrite,
    )
    write_line(f"{output}: complete and verified")


if __name__ == "__main__":
    run(main)
