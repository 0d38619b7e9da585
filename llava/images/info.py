"""Look into image files: what they hold, what a model would see of them, and why. Never who they are of.

--save writes what a model would see; with --model-path cropped and resized as that one's tower gets it.

python -m llava.images.info scan.dcm volume.nii.gz --save seen/
"""

import json
import os
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from llava.commandline import EXIT_BAD_INPUT, ArgumentParser, check_outputs, complain, existing_dir, run, write_line
from llava.errors import LlavaError
from llava.folders import expanded
from llava.image_options import add_window_flag
from llava.images.facts import ImageFacts


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="PNG, JPEG, TIFF, DICOM, NIfTI, …")
    parser.add_argument("--json", metavar="PATH", help="write what was found here; - is the terminal")
    parser.add_argument("--save", metavar="PATH", help="write what a model would see: a PNG, or a folder of them")
    parser.add_argument(
        "--frame", "--slice", type=int, help="of a multi-frame file, or slice of a volume; default: the middle one"
    )
    parser.add_argument("--axis", type=int, default=2, help="of a volume: 0 sagittal, 1 coronal, 2 axial")
    add_window_flag(parser, "")
    parser.add_argument("--model-path", help="with --save: crop and size as this checkpoint's tower gets it")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_outputs(args, args.files, "json", "save")
    if args.model_path and not args.save:
        raise LlavaError(f"--model-path {args.model_path}: it says what --save writes; give that too")
    options = {"frame": args.frame, "axis": args.axis, "window": args.window}
    save = _Saver(args) if args.save else None
    from llava.records import write_json, written_together

    with written_together():
        found, lines, failed = _look_at(args, options, save)
        if args.json not in (None, "-"):
            write_json(Path(args.json), found, overwrite=args.overwrite)
    # Not before: what they say is saved has its name now.
    for line in [json.dumps(found, ensure_ascii=False, indent=1)] if args.json == "-" else lines:
        write_line(line)
    return EXIT_BAD_INPUT if failed else 0


def _look_at(
    args: Namespace, options: dict[str, Any], save: "_Saver | None"
) -> tuple[list[dict[str, Any]], list[str], int]:
    """What `--json` holds of each file, the text of those that can be opened, and how many can't."""
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    failed = 0
    for file in args.files:
        from llava.images.opening import open_and_describe

        try:
            if os.path.isdir(expanded(file)):  # Path.is_dir raises at a name that is too long
                raise LlavaError(
                    f"{file}: a folder; name files in it ({Path(file) / '*'}), or make a training set of it: llava-med "
                    f"image-convert {file} --output-dir OUTPUT_FOLDER"
                )
            image, facts = open_and_describe(file, **options)
            saved = save(file, image) if save else None
        except LlavaError as error:
            failed += 1
            complain(f"error: {error}")
            found.append({"file": file, "error": str(error)})
            continue
        found.append({"file": file} | facts.as_dict() | ({"saved": str(saved)} if saved else {}))
        lines.append(_text(file, facts, saved))
    return found, lines, failed


class _Saver:
    """Writes PNGs of what is seen."""

    def __init__(self, args: Namespace):
        self.place = Path(args.save)
        self.saved: Counter[str] = Counter()
        self.is_file = self.place.suffix.lower() == ".png"
        if self.is_file and len(args.files) > 1:
            raise LlavaError(f"--save {args.save}: several files need a folder")
        self.processor, self.ratio, self.overwrite = None, None, args.overwrite
        if args.model_path:
            from llava.images import ImageProcessor
            from llava.images.processor import find_aspect_ratio

            folder = existing_dir(args.model_path, "--model-path")
            self.processor, self.ratio = ImageProcessor.find(folder), find_aspect_ratio(folder)
            if self.processor is None:
                raise LlavaError(f"{folder}: has no preprocessor_config.json; copy it from the model's source")

    def __call__(self, file: str, image: Image.Image) -> Path:
        from llava.records import atomic_path

        if self.processor is not None:
            pixels = self.processor([image], self.ratio)[0]
            image = self.processor.restore(pixels if pixels.ndim == 3 else pixels[0])
        path = self.place if self.is_file else self.place / self._name(file)
        with atomic_path(path, overwrite=self.overwrite) as temporary:
            image.save(temporary, "PNG")
        return path

    def _name(self, file: str) -> str:
        """Of the file's own name, which others of the same call may have too: 0001.dcm.png, then 0001.dcm-2.png."""
        name = Path(file).name
        self.saved[name] += 1
        return f"{name}.png" if self.saved[name] == 1 else f"{name}-{self.saved[name]}.png"


def _text(file: str, facts: ImageFacts, saved: Path | None) -> str:
    lines = [f"{file}: {facts.kind}, {facts.width} × {facts.height}, {facts.stored}"]
    if facts.modality:
        lines.append(f"  modality: {facts.modality}")
    if facts.orientation:
        lines.append(f"  orientation: {facts.orientation}")
    if facts.spacing_mm:
        lines.append(f"  spacing: {' × '.join(f'{size:g}' for size in facts.spacing_mm)} mm")
    lines.append(f"  shown: {'; '.join(facts.shown)}")
    return "\n".join(lines + ([f"  saved: {saved}"] if saved else []))


if __name__ == "__main__":
    run(main)
