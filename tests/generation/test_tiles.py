"""Images that are shown as tiles (`anyres`): as many as in training, and their pixels held no longer than needed."""

import pytest

from llava.generation import Engine
from tests.generation.conftest import ask


@pytest.fixture
def tiled(llama, monkeypatch):
    """The model with a grid of its own, three tiles wide."""
    size = llama.model.get_vision_tower().image_size
    monkeypatch.setattr(llama.model.config, "image_aspect_ratio", "anyres")
    monkeypatch.setattr(llama.model.config, "image_grid_pinpoints", [[3 * size, size]])
    return llama


def test_tiles_are_those_of_the_checkpoints_grid(tiled, images):
    encoder = Engine(tiled).encoder
    image = encoder.identify(images[0])
    assert encoder.num_positions(image) == 4 * tiled.model.num_patches
    assert len(encoder.features([image])[0]) == encoder.num_positions(image)


def test_pixels_of_all_images_are_not_held_at_once(tiled, images):
    """Each is opened before the first answer, to know how long its prompt is."""
    requests = [ask("What is it?", [image]) for image in images]
    engine = Engine(tiled, max_batch_size=1)
    held, features = [], engine.encoder.features

    def watched(asked):
        held.append(sum(image.pixels is not None for image in list(engine.encoder._images.values())))
        return features(asked)

    engine.encoder.features = watched
    answers = engine.generate(requests)
    assert 0 < max(held) < len(images), "a few are opened ahead"
    assert [answer.text for answer in answers] == [Engine(tiled).generate([one])[0].text for one in requests]
