"""Add delta weights to their base model, tensor by tensor: `target = base + delta`.

The released LLaVA-Med v1.0 models are such deltas over LLaMA 7B. Killed, the same command goes on.

python -m llava.model.apply_delta --base-model-path LLAMA --target-model-path RESULT --delta-path DELTA
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--base-model-path", "--base", required=True, help="plain language model: folder or hub id")
    parser.add_argument("--target-model-path", "--target", required=True, help="folder for the result")
    parser.add_argument("--delta-path", "--delta", required=True, help="delta: a folder, a .zip of one or a hub id")
    parser.add_overwrite()
    parser.add_bool("--check-inputs", default=True, help="compare what is read with the checksums in the files")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.model.convert.delta import apply_delta

    target = apply_delta(
        args.base_model_path,
        args.target_model_path,
        args.delta_path,
        overwrite=args.overwrite,
        check_inputs=args.check_inputs,
    )
    write_line(f"{target}: complete and verified")


if __name__ == "__main__":
    run(main)
