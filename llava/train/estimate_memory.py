"""Does a recipe fit the GPU, and how long does it take? The real training code says so without GPU and weights.

Takes the flags of a training command. Where `--data_path` exists lengths and numbers of images are read from it; else
full batches of random records with an image each are taken, and how many there are is told by `--records` or the file's
name. Models by name: llama-7b, llama-13b, mistral-7b, openai/clip-vit-large-patch14,
openai/clip-vit-large-patch14-336; else their folders, of which only the configuration and the tokenizer are read.

Exit code 0: it fits; 1: it doesn't, and flags that make it less are said; 2: flags or files that can't be used.

python -m llava.train.estimate_memory --gpu a100-40g --gpus 8 --model_name_or_path llama-7b \\
    --vision_tower openai/clip-vit-large-patch14 --data_path train.json --bf16 True --gradient_checkpointing True
"""

from dataclasses import replace

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--gpu",
        default="h100",
        help="one of a100-40g, a100-80g, h100, h200, a10, 3090, 4090, a6000, l4, l40, l40s, t4, v100-16g, v100-32g",
    )
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, one process each, eight to a machine")
    parser.add_argument("--records", type=int, help="how many there are, where --data_path is missing: for the hours")
    parser.add_argument("--json", help="also write the figures to this file, as one flat object")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> int:
    args, flags = build_parser().parse_known_args(argv)
    # Heavy, and not needed for --help.
    from llava.records import write_json
    from llava.train.estimate.ranks import by_ranks
    from llava.train.estimate.report import lines_of, remedies
    from llava.train.step.hardware import find_gpu

    gpu = find_gpu(args.gpu)
    for flag, number in (("--gpus", args.gpus), ("--records", args.records)):
        if number is not None and number < 1:
            raise LlavaError(f"{flag} {number}: expected at least 1")
    ranks = by_ranks(flags, gpu, args.gpus, args.records)
    worst = max((one for _, one in ranks), key=lambda one: one.peak_gb)
    first = ranks[0][1]  # it alone writes what is gathered
    prediction = replace(
        worst,
        mfu_eager=first.mfu_eager,
        checkpoint_gb=first.checkpoint_gb,
        checkpoint_host_gb=first.checkpoint_host_gb,
    )
    for line in lines_of(prediction, ranks):
        write_line(line)
    if args.json:
        each = [{"ranks": list(of), "peak_gb": one.peak_gb, "parts_gb": one.parts_gb} for of, one in ranks]
        figures = prediction.flat() | ({"ranks": each} if len(each) > 1 else {})
        write_json(args.json, figures, overwrite=args.overwrite)
    if prediction.fits:
        return 0
    write_line("flags that make it less, each in addition to those above it:")
    found = False
    for flag, changed in remedies(flags, prediction, args.records):
        found = changed.fits
        write_line(f"  {flag:64} → {changed.peak_gb:6.1f} GB{', fits' if found else ''}")
    if not found:
        write_line("no flag of these is enough: take more or larger GPUs, --bits 4 with --lora_enable True, or offload")
    return 1


if __name__ == "__main__":
    run(main)
