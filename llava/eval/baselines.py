"""Answer test questions from memory: the commonest answer, and the nearest training questions by text and images.

No model is asked. The answer files are like a model's: run_eval scores and compares them, reports show them.

python -m llava.eval.baselines --train train.json --test test.json --output-dir memory
"""

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
    if args.neighbours < 1:
        raise LlavaError(f"--neighbours is {args.neighbours}; give 1 or more")
    train, test = existing_file(args.train, "--train"), existing_file(args.test, "--test")
    if args.vision_tower and not args.image_folder:
        raise LlavaError("--vision-tower compares images; give their --image-folder")
    from llava.eval.answers.memory import commonest, read_known, text_and_image_likeness, write_memory_answers

    output = Path(args.output_dir)
    likeness: dict[str, tuple[Any, int]] = {
        "commonest": (commonest, len(read_known(train))),
        "nearest_text": (text_and_image_likeness(None, args.text_weight, 0.0), args.neighbours),
    }
    if args.vision_tower:
        features = _features(args, train, test)
        both = text_and_image_likeness(features, args.text_weight, args.image_weight)
        likeness["nearest_text_and_image"] = (both, args.neighbours)
    for name, (function, neighbours) in likeness.items():
        path = output / f"{name}.jsonl"
        empty = write_memory_answers(
            train,
            test,
            path,
            function,
            neighbours,
            f"memory: {name.replace('_', ' ')}",
            overwrite=args.overwrite,
        )
        unknown = f", {empty} without an answer (training has no question of their type)" if empty else ""
        write_line(f"{path}: complete{unknown}")


def _features(args: Any, train: Path, test: Path) -> "ImageFeatures":
    from llava.data.vqa_items import read_vqa_items
    from llava.eval.answers.image_vectors import image_vectors
    from llava.eval.answers.memory import ImageFeatures

    folder = existing_dir(args.image_folder, "--image-folder")
    elsewhere = existing_dir(args.train_image_folder, "--train-image-folder") if args.train_image_folder else folder
    known, asked = (
        {(place, item.image): (item.images[0], place) for item in read_vqa_items(path) if item.image}
        for path, place in ((train, elsewhere), (test, folder))
    )
    found = image_vectors(known | asked, args.vision_tower, batch_size=args.batch_size, device=args.device)
    return ImageFeatures(*({name: found[place, name] for place, name in part} for part in (known, asked)))


if __name__ == "__main__":
    run(main)
