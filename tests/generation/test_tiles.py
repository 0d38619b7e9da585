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
