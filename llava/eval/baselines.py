"""Answer test questions from memory: the commonest answer, and the nearest training questions by text and images.

No model is asked. The answer files are like a model's: run_eval scores and compares them, reports show them.

python -m llava.eval.baselines --train train.json --test test.json --output-dir memory
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.commandline import ArgumentParser, existing_dir, existing_file, run, write_line
from llava.errors import LlavaError

if TYPE_CHECKING:
    from llava.eval.answers.memory import ImageFeatures


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="training questions with their answers")
    parser.add_argument("--test", required=True, help="test questions")
    parser.add_argument("--output-dir", default="memory", help="folder for the answer files")
    parser.add_argument("--image-folder", help="images of both, for --vision-tower")
    parser.add_argument("--train-image-folder", help="images of training, where they lie elsewhere")
    parser.add_argument("--vision-tower", help="tower (folder or hub id) that images are compared by; none: text alone")
    parser.add_argument("--neighbours", type=int, default=15, help="how many of the nearest questions vote")
    parser.add_argument("--text-weight", type=float, default=8.0, help="of the cosine of the questions' words (TF-IDF)")
    parser.add_argument("--image-weight", type=float, default=8.0, help="of the cosine of the images' features")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once")
    parser.add_argument("--device", help="where the tower runs: cpu, cuda, … (default: the best there is)")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    _check(args)
    train, test = existing_file(args.train, "--train"), existing_file(args.test, "--test")
    from llava.eval.answers.memory import commonest, read_known, text_and_image_likeness, write_memory_answers

    output = Path(args.output_dir)
    everyone, by_text = len(read_known(train)), {"text_weight": args.text_weight}
    likeness: dict[str, tuple[Any, int, dict[str, Any]]] = {
        "commonest": (commonest, everyone, {}),
        "nearest_text": (text_and_image_likeness(None, args.text_weight, 0.0), args.neighbours, by_text),
    }
    if args.vision_tower:
        features = _features(args, train, test)
        both = text_and_image_likeness(features, args.text_weight, args.image_weight)
        names = ("text_weight", "image_weight", "vision_tower", "image_folder", "train_image_folder")
        likeness["nearest_text_and_image"] = both, args.neighbours, {name: getattr(args, name) for name in names}
    for name, (function, neighbours, settings) in likeness.items():
        path = output / f"{name}.jsonl"
        empty = write_memory_answers(
            train,
            test,
            path,
            function,
            neighbours,
            f"memory: {name.replace('_', ' ')}",
            settings=settings,
            overwrite=args.overwrite,
        )
        unknown = f", {empty} without an answer (training has no question of their type)" if empty else ""
        write_line(f"{path}: complete{unknown}")


def _check(args: Any) -> None:
    for flag, value in (("--neighbours", args.neighbours), ("--batch-size", args.batch_size)):
        if value < 1:
            raise LlavaError(f"{flag} is {value}; give 1 or more")
    for flag, value in (("--text-weight", args.text_weight), ("--image-weight", args.image_weight)):
        if not 0 <= value < math.inf:
            raise LlavaError(f"{flag} is {value}; give a number from 0 on")
    if args.vision_tower and not args.image_folder:
        raise LlavaError("--vision-tower compares images; give their --image-folder")
    for flag, value in (("--image-folder", args.image_folder), ("--train-image-folder", args.train_image_folder)):
        if value and not args.vision_tower:
            raise LlavaError(f"{flag} is for comparing images; give the --vision-tower to compare them by")


def _features(args: Any, train: Path, test: Path) -> "ImageFeatures":
    from llava.data.vqa_items import vqa_item
    from llava.eval.answers.image_vectors import image_vectors
    from llava.eval.answers.memory import ImageFeatures
    from llava.records import iter_records

    folder = existing_dir(args.image_folder, "--image-folder")
    elsewhere = existing_dir(args.train_image_folder, "--train-image-folder") if args.train_image_folder else folder

    def images(path: Path, place: Path) -> dict[tuple[Path, str], tuple[Any, Path]]:
        items = (vqa_item(record, f"{path} record {number}") for number, record in enumerate(iter_records(path)))
        return {(place, item.image): (item.images[0], place) for item in items if item.image}

    known, asked = images(train, elsewhere), images(test, folder)
    found = image_vectors(known | asked, args.vision_tower, batch_size=args.batch_size, device=args.device)
    return ImageFeatures(*({name: found[place, name] for place, name in part} for part in (known, asked)))


if __name__ == "__main__":
    run(main)
