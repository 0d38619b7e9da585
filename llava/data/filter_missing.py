"""Drop records whose image isn't in the image folder: what a download that lost some images calls for.

    python -m llava.data.filter_missing train.json --image-folder images --output train_there.json

Only the presence of images is looked at; `llava.data.validate` opens them.
"""

from collections.abc import Iterator
from pathlib import Path

from llava.commandline import ArgumentParser, check_outputs, existing_dir, existing_file, run, write_line
from llava.errors import LlavaError, amount
from llava.folders import is_file, other_form_note
from llava.record_content import image_file, images_of
from llava.records import Record, iter_records, write_json, write_records, written_together


class Missing:
    """Records read, records dropped, and the images that aren't there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.records = 0
        self.dropped = 0
        self.text_only = 0
        self.images: dict[str, None] = {}
        self._there: dict[str, bool] = {}

    def is_there(self, name: str) -> bool:
        if name not in self._there:
            self._there[name] = is_file(self.folder / name)
        if not self._there[name]:
            self.images[name] = None
        return self._there[name]

    def note(self) -> str:
        return other_form_note([self.folder / name for name in self.images])


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("input", help="JSON, JSONL or Parquet")
    parser.add_argument("--image-folder", required=True, help="where the images are looked for")
    parser.add_argument("--output", required=True, help=".json, .jsonl or .parquet")
    parser.add_argument("--missing-list", metavar="PATH", help="write the names of the missing images as JSON")
    parser.add_overwrite()
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    path = existing_file(args.input, "record file")
    check_outputs(args, [path], "output", "missing_list")
    missing = Missing(existing_dir(args.image_folder, "--image-folder"))
    with written_together():
        kept = write_records(args.output, with_images(path, missing), overwrite=args.overwrite)
        if args.missing_list:
            write_json(args.missing_list, list(missing.images), overwrite=args.overwrite)
    write_line(
        f"{args.output}: {kept:,} of {amount(missing.records, 'record')} ({missing.text_only:,} of text alone); "
        f"{missing.dropped:,} dropped for {amount(len(missing.images), 'missing image')}{missing.note()}"
    )
    return 0


def with_images(path: Path, missing: Missing) -> Iterator[Record]:
    """The records whose images are all there, text-only ones too.

    Raises:
        LlavaError: none is left: the folder is most likely the wrong one.
    """
    for record in iter_records(path):
        missing.records += 1
        # A list, so that every missing image is noted, not only the first of a record.
        images = images_of(record, f"{path} record {missing.records - 1}")
        found = [missing.is_there(name) for name in map(image_file, images) if _is_file_name(name)]
        missing.text_only += not images
        if all(found):
            yield record
        else:
            missing.dropped += 1
    if not missing.records:
        raise LlavaError(f"{path}: there are no records in it")
    if missing.dropped == missing.records:
        raise LlavaError(
            f"{path}: no record of {missing.records:,} has its image under {missing.folder} "
            f"(first: {next(iter(missing.images), '')}){missing.note()}; is it the right folder?"
        )


def _is_file_name(image) -> bool:
    return isinstance(image, str) and not image.startswith("data:")


if __name__ == "__main__":
    run(main)
