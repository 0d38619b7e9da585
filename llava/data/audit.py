"""Is the test set clean? Images, questions and answers that training has already seen.

Reads raw VQA-RAD or SLAKE rows or LLaVA-Med records. Images count as the same by name, by their pixels, or nearly
(hash and thumbnail); cropped or turned copies are not found.

python -m llava.data.audit --train train.json --test test.json --image-folder images
"""

from pathlib import Path

from llava.commandline import ArgumentParser, check_outputs, existing_dir, existing_file, run, write_line
from llava.errors import LlavaError, amount


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="training questions")
    parser.add_argument("--test", required=True, help="test questions")
    parser.add_argument("--image-folder", help="images of both; without it images are compared by name alone")
    parser.add_argument("--train-image-folder", help="images of training, where they lie elsewhere")
    parser.add_argument("--jaccard", type=float, default=0.5, help="from here two questions are near duplicates")
    parser.add_argument("--output", help="write everything here (JSON), for run_eval --audit and the report")
    parser.add_argument("--clean-train", help="write training's records here, those on an image of the test left out")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if not 0 < args.jaccard <= 1:
        raise LlavaError(f"--jaccard is {args.jaccard}; give a share above 0 and at most 1")
    from llava.data.audit_checks import audit_splits
    from llava.data.audit_text import audit_lines
    from llava.data.vqa_items import read_vqa_items
    from llava.records import iter_records, write_json, write_records, written_together

    train, test = existing_file(args.train, "--train"), existing_file(args.test, "--test")
    check_outputs(args, [train, test], "output", "clean_train")
    folder = args.image_folder and existing_dir(args.image_folder, "--image-folder")
    train_folder = args.train_image_folder and existing_dir(args.train_image_folder, "--train-image-folder")
    audit = audit_splits(
        read_vqa_items(train, later_turns=True),
        read_vqa_items(test),
        train_images=train_folder or folder or None,
        test_images=folder or None,
        jaccard=args.jaccard,
    )
    write_line("\n".join(audit_lines(audit)))
    left_out = {str(key) for key in audit["train_on_test_images"]}
    with written_together():
        if args.output:
            content = {"train_file": str(train), "test_file": str(test), **audit}
            write_json(Path(args.output), content, overwrite=args.overwrite)
        if args.clean_train:
            items = zip(iter_records(train), read_vqa_items(train), strict=True)
            clean = (record for record, item in items if str(item.id) not in left_out)
            kept = write_records(args.clean_train, clean, overwrite=args.overwrite)
    if args.clean_train:
        kept_records = amount(kept, "training record")
        write_line(f"{args.clean_train}: {kept_records}, {len(left_out):,} on an image of the test left out")


if __name__ == "__main__":
    run(main)
