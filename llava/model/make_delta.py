"""Write the difference of a model to its base: what may be published where the base may not.

Whoever has the base adds both up again with llava.model.apply_delta, and gets the model back: in its own precision,
but for the last place of single values, as base and difference are rounded apart.

python -m llava.model.make_delta --base-model-path LLAMA --target-model-path MODEL --delta-path DELTA
"""

from llava.commandline import ArgumentParser, run, write_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--base-model-path", "--base", required=True, help="plain language model: folder or hub id")
    parser.add_argument("--target-model-path", "--target", required=True, help="the trained model: folder or hub id")
    parser.add_argument("--delta-path", "--delta", required=True, help="folder for the delta")
    parser.add_argument("--hub-repo-id", help="upload the delta to this repository of the hub (made if needed)")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="default: the target's; the releases are float16"
    )
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import torch

    from llava.model.convert.delta import make_delta
    from llava.model.convert.hub_upload import check_can_upload, upload_folder

    if args.hub_repo_id:
        check_can_upload(args.hub_repo_id)
    delta = make_delta(
        args.base_model_path,
        args.target_model_path,
        args.delta_path,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        overwrite=args.overwrite,
    )
    write_line(f"{delta}: complete and verified")
    if args.hub_repo_id:
        write_line(f"uploaded to {upload_folder(delta, args.hub_repo_id)}")


if __name__ == "__main__":
    run(main)
