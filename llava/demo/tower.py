"""Train a small CLIP vision tower on images and the sentences of their captions.

A caption is a few sentences, a fact in each. Each token of the tower learns to tell one of them from those that
never stand with it in one caption.

python -m llava.demo.tower --data-path captions.json --image-folder images --language-model LLM --output-dir tower
"""

import re
from pathlib import Path

from llava.commandline import ArgumentParser, run
from llava.folders import WEIGHTS, check_target, stage_files


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data-path", required=True, help="records with image and caption")
    parser.add_argument("--image-folder", required=True, help="where the images lie")
    parser.add_argument("--language-model", required=True, help="folder of the one whose words captions are made of")
    parser.add_argument("--output-dir", required=True, help="folder of the tower")
    parser.add_argument("--steps", type=int, default=1900, help="of training")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once")
    parser.add_argument("--image-size", type=int, default=96, help="pixels per side")
    parser.add_argument("--patch-size", type=int, default=16, help="pixels per side")
    parser.add_argument("--layers", type=int, default=3, help="of the tower")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the tower")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_target(args.output_dir, args.overwrite)
    from llava.demo.fitting import in_processes

    in_processes(train_tower, args, args.processes)


def train_tower(args) -> None:
    """Train and save: a CLIP tower's folder with preprocessor_config.json."""
    import torch

    from llava.demo.fitting import fit, is_first, own_part, process_number, shuffled
    from llava.demo.tower_model import SentenceMatching, sentence_embeddings, standardise, start_embeddings
    from llava.errors import LlavaError
    from llava.images import ImageProcessor
    from llava.record_content import first_pair
    from llava.records import read_records

    records = read_records(args.data_path)
    if not records:
        raise LlavaError(f"{args.data_path}: holds no records")
    told = [first_pair(record, f"{args.data_path} record {number}")[1] for number, record in enumerate(records)]
    size = args.image_size
    processor = ImageProcessor(size=size, crop_size=(size, size))
    pixels = _read_images(records, args, processor)
    sentences, captions = caption_sentences(told)
    levels = torch.from_numpy(processor._levels())
    texts = sentence_embeddings(sentences, args.language_model)
    model = SentenceMatching(args, texts, exclusions(captions, len(sentences)))
    start_embeddings(model.tower, normalise(pixels[:1500], levels))

    mirrored = torch.tensor(mirror_columns(sentences))
    # The model is the same in all processes; how they vary their images is not.
    torch.manual_seed(args.seed + 1 + process_number())

    def loss_of(numbers):
        flip = torch.rand(len(numbers)) < 0.5
        batch = vary(normalise(pixels[numbers], levels), flip)
        return model(batch, torch.where(flip[:, None], mirrored[captions[numbers]], captions[numbers]))

    fit(
        model,
        own_part(shuffled(len(records), args.batch_size, args.seed)),
        loss_of,
        steps=args.steps,
        lr=6e-4,
        matrix_lr=3e-3,
        hidden=lambda name: name.startswith("tower.encoder"),
        name="vision tower",
        folder=Path(args.output_dir),
    )
    if is_first():
        standardise(model.tower, normalise(pixels[:256], levels))
        with stage_files(args.output_dir, last="config.json", stale=WEIGHTS) as folder:
            model.tower.save_pretrained(folder)
            processor.save_pretrained(folder)


def caption_sentences(captions: list[str]):
    """(distinct sentences, int64 tensor `[captions, most sentences]` of their numbers; short ones repeat the last)."""
    import torch

    split = [[part.strip() + "." for part in caption.split(".") if part.strip()] for caption in captions]
    sentences = sorted({sentence for parts in split for sentence in parts})
    number = {sentence: index for index, sentence in enumerate(sentences)}
    longest = max(map(len, split))
    numbers = [[number[part] for part in parts] + [number[parts[-1]]] * (longest - len(parts)) for parts in split]
    return sentences, torch.tensor(numbers)


def exclusions(captions, count: int):
    """bool `[count, count]`: the two sentences never stand in one caption, such as left and right."""
    import torch

    holds = torch.zeros(len(captions), count).scatter_(1, captions, 1.0)
    return holds.T @ holds == 0


def mirror_columns(sentences: list[str]) -> list[int]:
    """For each sentence the number of the one that is true of the mirrored image."""
    swap = {"left": "right", "right": "left"}
    turned = [re.sub(r"\b(left|right)\b", lambda word: swap[word.group()], sentence) for sentence in sentences]
    return [sentences.index(text) if text in sentences else own for own, text in enumerate(turned)]


def vary(pixel_values, flip):
    """Some images mirrored, all shifted by up to a twentieth and exposed a little differently."""
    import torch

    reach = pixel_values.shape[-1] // 20
    varied = torch.empty_like(pixel_values)
    shifts = torch.randint(-reach, reach + 1, (len(pixel_values), 2)).tolist()
    for row, (down, across) in enumerate(shifts):
        image = pixel_values[row].flip(-1) if flip[row] else pixel_values[row]
        varied[row] = image.roll((down, across), (-2, -1))
    gain = 1 + 0.15 * (torch.rand(len(varied), 1, 1, 1) - 0.5)
    return varied * gain + 0.2 * (torch.rand(len(varied), 1, 1, 1) - 0.5)


def normalise(pixels, levels):
    """uint8 [n, 3, H, W] to the processor's float32: the same levels, looked up here batch by batch."""
    import torch

    return torch.stack([levels[channel][pixels[:, channel].long()] for channel in range(3)], dim=1)


def _read_images(records: list[dict], args, processor):
    """The image of each record as uint8 [n, 3, size, size]: a quarter of what their float32 pixel values take."""
    import numpy as np
    import torch

    from llava.bars import tqdm
    from llava.demo.fitting import is_first
    from llava.errors import LlavaError
    from llava.image_options import with_options_of
    from llava.images import open_image
    from llava.record_content import image_file, images_of

    pixels = np.empty((len(records), 3, *processor.crop_size), np.uint8)
    bar = tqdm(records, desc="reading images", unit="image", mininterval=0.5, disable=not is_first())
    for number, record in enumerate(bar):
        where = f"{args.data_path} record {number}"
        images = images_of(record, where)
        if len(images) != 1 or not isinstance(name := image_file(images[0]), str):
            raise LlavaError(f"{where}: a caption is of one image, named by its path; here are {len(images)}")
        image = open_image(with_options_of(images[0], Path(args.image_folder) / name))
        pixels[number] = np.asarray(processor.fit(image)).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


if __name__ == "__main__":
    run(main)
