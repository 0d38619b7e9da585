"""Write an 8- or 4-bit version of a checkpoint (bitsandbytes), a quarter to a half of its size.

Vision tower, projector and head stay as they are. To load a model so, without writing it: --load-8bit of the commands.

python -m llava.model.quantize --model-path CHECKPOINT --output FOLDER --bits 8
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint of any layout: folder or hub id")
    parser.add_argument("--model-base", help="base model of a LoRA or projector folder")
    parser.add_argument("--output", "--save-model-path", required=True, help="folder for the result")
    parser.add_argument("--bits", type=int, choices=[8, 4], default=8, help="8: LLM.int8; 4: --quant-type")
    parser.add_argument("--quant-type", choices=["nf4", "fp4"], default="nf4", help="data type of 4 bits")
    parser.add_bool("--double-quant", default=True, help="quantize the scales of 4 bits too")
    parser.add_argument("--device", help="where to quantize: cpu, cuda, ... (default: the best there is)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="of what stays unquantized")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.errors import require

    require("bitsandbytes", "quantized")
    from llava.model.convert.quantized_writer import quantize

    output = quantize(
        args.model_path,
        args.output,
        args.bits,
        args.model_base,
        device=args.device,
        dtype=args.dtype,
        quant_type=args.quant_type,
        double_quant=args.double_quant,
        overwrite=args.overwrite,
    )
    write_line(f"{output}: complete, language model in {args.bits} bits")


if __name__ == "__main__":
    run(main)
