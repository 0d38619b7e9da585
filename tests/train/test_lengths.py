import json

import numpy as np
import pytest
import torch
from PIL import ImageFile

from llava.constants import IMAGE_TOKEN_INDEX
from llava.record_content import image_key
from llava.tokenization import Encoded
from llava.train.arguments import parse_arguments
from llava.train.data.dataset import LlavaDataset
from llava.train.data.feature_cache import build_feature_cache
from llava.train.data.image_source import ImageSource
from llava.train.data.kept_files import kept_path
from llava.train.data.lengths import load_lengths, save_lengths
from llava.train.data.record_store import open_records
from llava.train.prepare_model import prepare_model
from llava.train.setup_run import build_dataset
from tests.train.helpers import flags, make_records


def dataset(path, calls, **more):
    def encode(record, features):
        calls.append(record["id"])
        length = record["id"] + 2 + sum(features)
        ids = [-200] * sum(features) + [5] * (length - sum(features))
        return Encoded(ids, ids, len(features))

    return LlavaDataset(
        open_records(path),
        encode,
        ImageSource(None),
        load_image=None,
        count_features=lambda image: 3,
        max_length=100,
        lazy=True,
        lengths_path=kept_path(path, path.parent, "lengths.npy", {"template": "v1"}),
        **more,
    )


def test_lengths_need_no_image_and_are_counted_once(tmp_path):
    path = tmp_path / "data.json"
    # No such image exists, and nothing looks for it.
    path.write_text(json.dumps([{"id": n, **({"image": "gone.png"} if n % 2 else {})} for n in range(4)]))
    calls = []
    first = dataset(path, calls)
    assert first.lengths().tolist() == [2, 6, 4, 8]
    assert first.has_image().tolist() == [False, True, False, True]
    assert calls == [0, 1, 2, 3]
    assert dataset(path, calls).lengths().tolist() == [2, 6, 4, 8]
    assert len(calls) == 4


def test_other_settings_or_data_are_counted_anew(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("[{}]")
    before = kept_path(path, tmp_path, "lengths.npy", {"template": "v1"})
    assert before.parent == tmp_path
    assert kept_path(path, tmp_path, "lengths.npy", {"template": "v0"}) != before
    path.write_text("[{}, {}]")
    assert kept_path(path, tmp_path, "lengths.npy", {"template": "v1"}) != before


def test_a_damaged_file_is_said_and_counted_anew(tmp_path, caplog):
    path = tmp_path / "lengths.npy"
    save_lengths(path, np.array([3, -4]))
    assert load_lengths(path, 2).tolist() == [3, -4]
    assert load_lengths(path, 3) is None
    path.write_bytes(b"broken")
    assert load_lengths(path, 2) is None
    assert "counting anew" in caplog.text


def test_tiles_of_another_grid_are_counted_anew(tmp_path, base):
    arguments = parse_arguments(flags(tmp_path, make_records(tmp_path), base, "--lazy_preprocess", "True"))
    loaded = prepare_model(arguments)
    paths = []
    for grid in (None, [[64, 32]], [[64, 32], [32, 64]]):
        loaded.model.config.image_grid_pinpoints = grid
        paths.append(build_dataset(arguments, loaded, open_records(arguments.data.data_path))[0].lengths_path)
    assert len(set(paths)) == 3


@pytest.mark.parametrize("lazy", ["True", "False"])
def test_tiles_are_counted_by_the_size_and_an_image_is_decoded_once(tmp_path, base, monkeypatch, lazy):
    words = flags(
        tmp_path, make_records(tmp_path, 4), base, "--lazy_preprocess", lazy, "--image_aspect_ratio", "anyres"
    )
    arguments = parse_arguments(words)
    loaded = prepare_model(arguments)
    decoded = []
    whole = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self) or whole(self))
    dataset, _ = build_dataset(arguments, loaded, open_records(arguments.data.data_path))
    lengths = dataset.lengths()
    assert not decoded
    items = [dataset[index] for index in range(4)]
    assert len({id(image) for image in decoded}) == 4
    patches = loaded.model.num_patches
    for length, item in zip(lengths, items, strict=True):
        assert len(item["sample"].input_ids) == length
        assert (item["sample"].input_ids == IMAGE_TOKEN_INDEX).sum() == patches * len(item["pixel_values"])


class Mean(torch.nn.Module):
    """In place of a tower: the mean of an image."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, pixels):
        return pixels.flatten(1).mean(1)[:, None, None] * self.weight


def cache_of(folder, count, **more):
    """Features of images, each of which is its number in every pixel."""
    images = {image_key(f"{number}.png"): (number, f"{number}.png") for number in range(count)}
    found = build_feature_cache(
        folder,
        images,
        identify=lambda number, image: image,
        **{"load": pixels_of} | more,
        tower=Mean(),
        show_progress=False,
    )
    assert [float(found.take([found.row(f"{number}.png")])) for number in range(count)] == list(range(count))


def pixels_of(number, image):
    return np.full((1, 3, 2, 2), number, np.float32)


def test_features_are_extended_after_a_run_was_killed_in_it(tmp_path):
    """As a kill leaves them between the two files: new rows, and an index that doesn't know them."""
    cache_of(tmp_path, 3)
    index = (tmp_path / "index.json").read_bytes()
    cache_of(tmp_path, 5)
    (tmp_path / "index.json").write_bytes(index)
    for count in (5, 9):
        cache_of(tmp_path, count)


def test_features_are_written_as_they_are_computed(tmp_path):
    """All of them may be more than memory holds: the file is there before the last image is opened."""
    largest = []

    def load(number, image):
        largest.append(max((path.stat().st_size for path in tmp_path.rglob("*")), default=0))
        return pixels_of(number, image)

    cache_of(tmp_path, 8, load=load, batch_size=2)
    assert largest[0] < 8 * 4 < largest[-1] == (tmp_path / "features.npy").stat().st_size
