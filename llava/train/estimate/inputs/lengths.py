"""The lengths that a recipe's samples have: its data's own where they are at hand, else random ones."""

from dataclasses import dataclass, replace

import numpy as np

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.folders import expanded
from llava.images.anyres import default_pinpoints, read_pinpoints
from llava.model import LoadedModel
from llava.record_content import images_of, read_turns
from llava.records import Record
from llava.train.arguments import Arguments
from llava.train.data.record_store import RecordStore, open_records
from llava.train.estimate.inputs.names import told_records
from llava.train.estimate.inputs.shapes import TextlessTokenizer
from llava.train.setup_run import build_dataset

MEAN_TEXT, DEVIATION = 300.0, 250.0
"""Tokens of text of a random sample (llava's own instruction data has about as many)."""
RANDOM, READ = 1000, 2000
"""Samples: made where there are no data, and read at most, spread over the file."""
CHARACTERS = 4
"""Of a token, where the model's tokenizer isn't at hand."""


@dataclass(frozen=True)
class Lengths:
    """Of samples as a recipe has them.

    Attributes:
        positions: int64 [samples], with those of the images.
        tiles: int64 [samples], squares that the tower sees.
        records: of the whole data; None if that isn't known.
        note: where all this is from.
        are_read: whether they are those of data.
    """

    positions: np.ndarray
    tiles: np.ndarray
    records: int | None
    note: str
    are_read: bool = False


def lengths_of(arguments: Arguments, loaded: LoadedModel, records: int | None) -> Lengths:
    """Those of `--data_path` where it exists, else random ones; `records` is what the user says of its number."""
    path = arguments.data.data_path
    if path and expanded(path).is_file():
        return _read(arguments, loaded, open_records(path, arguments.training.output_dir))
    longest, number = arguments.training.model_max_length, records
    tiles = min(_tiles_per_image(loaded), _most_tiles(loaded, longest))
    shown = "with an image each" if tiles else f"without images: none fits into --model_max_length {longest}"
    note = f"full batches of random records {shown}"
    if path:
        number = records or told_records(path)
        note = f"--data_path {path} isn't there: {note}"
        if number and not records:
            note += f"; {number:,} of them, by its name"
    text = _random_texts(np.random.default_rng(0), RANDOM)
    positions = (text + tiles * loaded.model.num_patches).clip(None, longest).astype(np.int64)
    return Lengths(positions, np.full(RANDOM, tiles), number, note)


def _read(arguments: Arguments, loaded: LoadedModel, store: RecordStore) -> Lengths:
    """Lengths and images of records spread over a file, as training would make samples of them."""
    spread = Spread(store)
    longest = arguments.training.model_max_length
    patches = loaded.model.num_patches
    can_open = bool(arguments.data.image_folder) and expanded(str(arguments.data.image_folder)).exists()
    known = can_open or loaded.model.config.image_aspect_ratio != "anyres"
    if known and not isinstance(loaded.tokenizer, TextlessTokenizer):
        data = replace(arguments.data, lazy_preprocess=True, cache_vision_features=False)
        if not can_open:
            data = replace(data, image_folder=None)
        dataset, _ = build_dataset(replace(arguments, data=data), loaded, spread)
        samples = [dataset.sample(number) for number in range(len(spread))]
        positions = [len(sample.input_ids) for sample in samples]
        tiles = [int((sample.input_ids == IMAGE_TOKEN_INDEX).sum()) // patches for sample in samples]
        how = "as the model's tokenizer counts"
    else:
        each, most = _tiles_per_image(loaded), _most_tiles(loaded, longest)
        places = [f"{store.path} record {number}" for number in spread.numbers]
        tiles = [min(each * len(images_of(spread[n], where)), most) for n, where in enumerate(places)]
        texts = [_tokens(spread[number], where) for number, where in enumerate(places)]
        positions = [min(text + count * patches, longest) for text, count in zip(texts, tiles)]
        how = f"{CHARACTERS} characters taken for a token"
    found = Lengths(np.array(positions), np.array(tiles), len(store), "", are_read=True)
    squares = "tiles" if loaded.model.config.image_aspect_ratio == "anyres" else "images"
    note = (
        f"--data_path {store.path}: {len(spread):,} of {len(store):,} records read, {found.positions.mean():,.0f} "
        f"tokens on average ({how}), {found.positions.max():,} at most, {found.tiles.mean():.2g} {squares}"
    )
    return replace(found, note=note)


class Spread:
    """At most READ records of a store, spread over it evenly."""

    def __init__(self, store: RecordStore):
        self.path = store.path
        self.store = store
        self.numbers = np.unique(np.linspace(0, len(store) - 1, min(READ, len(store))).round().astype(int))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        return self.store[int(self.numbers[index])]


def _tokens(record: Record, where: str) -> int:
    try:
        return sum(len(turn.text) for turn in read_turns(record)) // CHARACTERS + 1
    except LlavaError as error:
        raise LlavaError(f"{where}: {error}") from error


def _tiles_per_image(loaded: LoadedModel) -> int:
    """The most that an image is cut into."""
    config = loaded.model.config
    if config.image_aspect_ratio != "anyres":
        return 1
    size = loaded.model.get_vision_tower().image_size
    pinpoints = config.image_grid_pinpoints
    grids = read_pinpoints(pinpoints, size) if pinpoints else default_pinpoints(size)
    return 1 + max(width * height for width, height in grids) // size**2


def _most_tiles(loaded: LoadedModel, longest: int) -> int:
    """How many fit whole into a sample, with some text."""
    return (longest - 2) // loaded.model.num_patches


def _random_texts(random: np.random.Generator, count: int) -> np.ndarray:
    """Tokens of text of `count` samples, log-normal."""
    variance = np.log(1 + (DEVIATION / MEAN_TEXT) ** 2)
    return random.lognormal(np.log(MEAN_TEXT) - variance / 2, np.sqrt(variance), count).clip(20, None)
