"""Opening images against the same by hand: DICOM slices to pixel values, and a large JPEG to the tower's size.

python benchmarks/images.py [--json figures.json]

Both ways take turns, image by image, in one process; counted is processor time. What they give is compared first.
"""

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from checkout import add_json_flag, show
from PIL import Image

from llava.commandline import ArgumentParser, run
from llava.images import ImageProcessor, open_image

SIDE, EDGE = 512, 2000
WINDOW = (40, 400)
PROCESSOR = ImageProcessor(size=336, crop_size=(336, 336))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="over the slices, of which the median counts")
    parser.add_argument("--jpegs", type=int, default=20, help="times that the JPEG is opened in each round")
    add_json_flag(parser)
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        slices = [make_slice(Path(folder) / f"{number}.dcm", number) for number in range(args.slices)]
        jpeg = make_jpeg(Path(folder) / "large.jpg")
        scans = compare(slices, pixels_of_slice, pixels_of_slice_by_hand, 0.02, args.rounds)
        photographs = compare([jpeg] * args.jpegs, shrunk, shrunk_by_hand, 1, args.rounds)
    figures = {
        "slices_per_second": args.slices / median(ours for ours, _ in scans),
        "slices_by_hand_per_second": args.slices / median(hand for _, hand in scans),
        "slices_over_by_hand_ratio": median(hand / ours for ours, hand in scans),
        "jpeg_ms": 1000 * median(ours for ours, _ in photographs) / args.jpegs,
        "jpeg_by_hand_ms": 1000 * median(hand for _, hand in photographs) / args.jpegs,
        "jpeg_over_by_hand_ratio": median(ours / hand for ours, hand in photographs),
    }
    show(f"{args.slices} DICOM slices of {SIDE} × {SIDE}, a JPEG of {EDGE} × {EDGE}", figures, args.json)
    return 0


def compare(
    paths: list[Path], ours: Callable, by_hand: Callable, most: float, rounds: int
) -> list[tuple[float, float]]:
    """Processor seconds (ours, by hand) over all paths, for each round."""
    difference = np.abs(np.asarray(ours(paths[0]), float) - np.asarray(by_hand(paths[0]), float)).max()
    if difference > most:
        raise SystemExit(f"the two ways differ by {difference}: the figures would mean nothing")
    found = []
    for _ in range(rounds):
        seconds = [0.0, 0.0]
        for path in paths:
            for place, way in enumerate((ours, by_hand)):
                began = time.process_time()
                way(path)
                seconds[place] += time.process_time() - began
        found.append((seconds[0], seconds[1]))
    return found


def pixels_of_slice(path: Path) -> np.ndarray:
    return PROCESSOR(open_image(path, window=WINDOW))[0]


def pixels_of_slice_by_hand(path: Path) -> np.ndarray:
    """float32 `[3, 336, 336]` with pydicom, numpy and Pillow alone, as one would write it."""
    import pydicom

    dataset = pydicom.dcmread(path)
    values = dataset.pixel_array.astype(np.float32) * dataset.RescaleSlope + dataset.RescaleIntercept
    low = WINDOW[0] - 0.5 - (WINDOW[1] - 1) / 2
    grey = np.clip((values - low) / (WINDOW[1] - 1) * 255, 0, 255).round().astype(np.uint8)
    image = Image.fromarray(grey).convert("RGB").resize((336, 336), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32) / 255
    mean, std = (np.array(part, np.float32) for part in (PROCESSOR.image_mean, PROCESSOR.image_std))
    return ((pixels - mean) / std).transpose(2, 0, 1)


def shrunk(path: Path) -> Image.Image:
    return PROCESSOR.fit(open_image(path))


def shrunk_by_hand(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((336, 336), Image.Resampling.BICUBIC)


def make_slice(path: Path, number: int) -> Path:
    """A CT slice with the header that scanners write."""
    import pydicom
    from pydicom.data import get_testdata_file

    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    across = np.linspace(-1, 1, SIDE)
    body = 1000 * (across[:, None] ** 2 + across**2 < 0.5 + number / 1000)
    noise = np.random.default_rng(number).normal(0, 30, (SIDE, SIDE))
    dataset.Rows = dataset.Columns = SIDE
    dataset.PixelData = (body + noise).astype(np.int16).tobytes()
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1000
    del dataset.PixelPaddingValue
    dataset.save_as(path)
    return path


def make_jpeg(path: Path) -> Path:
    """Like a photograph: large shapes and some grain."""
    generator = np.random.default_rng(0)
    shapes = Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((EDGE, EDGE))
    pixels = np.asarray(shapes, np.int16) + generator.integers(-8, 9, (EDGE, EDGE, 3), dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    path.write_bytes(buffer.getvalue())
    return path


if __name__ == "__main__":
    run(main)
