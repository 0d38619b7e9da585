"""Does a recipe fit the GPU, and how long does it take? The real training code says so without GPU and weights.

Takes the flags of a training command; `--data_path`, `--image_folder` and `--output_dir` may be missing: then a full
batch of random records with an image each. Models by name: llama-7b, llama-13b, mistral-7b,
openai/clip-vit-large-patch14, openai/clip-vit-large-patch14-336; else their folders, of which only the configuration
is read.
"""

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h100", help="a100-40g, a100-80g, h100, h200, a10, 4090 or l40s")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, one process each, eight to a machine")
    parser.add_argument("--records", type=int, help="how many there are, where --data_path is missing: for the hours")
    parser.add_argument("--json", help="also write the figures to this file, as one flat object")
    return parser


def main(argv: list[str] | None = None) -> int:
    args, flags = build_parser().parse_known_args(argv)
    # Heavy, and not needed for --help.
    from llava.records import write_json
    from llava.train.estimate.dry_run import dry_run
    from llava.train.estimate.report import lines_of, remedies
    from llava.train.hardware import find_gpu

    gpu = find_gpu(args.gpu)
    for flag, number in (("--gpus", args.gpus), ("--records", args.records)):
        if number is not None and number < 1:
            raise LlavaError(f"{flag} {number}: expected at least 1")
    prediction = dry_run(flags, gpu, args.gpus, args.records)
    for line in lines_of(prediction):
        write_line(line)
    if args.json:
        write_json(args.json, prediction.flat())
    if prediction.fits:
        return 0
    found = False
    for flag, changed in remedies(flags, prediction, args.records):
        found = changed.fits
        write_line(f"  {flag:64} → {changed.peak_gb:6.1f} GB{', fits' if found else ''}")
    if not found:
        write_line("no flag of these is enough: take more or larger GPUs, --bits 4 with --lora_enable True, or offload")
    return 1


if __name__ == "__main__":
    run(main)
