"""A projector solved by least squares: what it comes near to, and what can't be solved."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.train.fit_projector import Features, solve, word_targets
from llava.train.train import train
from tests.tiny import make_llava, make_tokenizer
from tests.train.helpers import flags, losses, make_bases

NAMES = ("liver", "heart", "brain", "spleen", "kidney", "lung")


class Stored:
    """Features as `FeatureCache` gives them."""

    def __init__(self, features):
        self.features = features

    def take(self, rows):
        return self.features[rows]


def drawn(images=20, patches=9, width=12):
    """Features with a large part in common, a small one of the image, and a smaller one of the patch."""
    random = torch.Generator().manual_seed(0)
    common = 30 * torch.randn(1, 1, width, generator=random)
    own = torch.randn(images, 1, width, generator=random)
    return common + own + 0.1 * torch.randn(images, patches, width, generator=random)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_patches_come_near_their_images_targets(layers):
    features, targets = drawn(), torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    steps = [torch.nn.Linear(12, 64 if layers > 1 else 16)]
    for number in range(1, layers):
        steps += [torch.nn.GELU(), torch.nn.Linear(64, 64 if number < layers - 1 else 16)]
    projector = torch.nn.Sequential(*steps) if layers > 1 else steps[0]
    found = solve(projector, Features(Stored(features), list(range(20))), targets, 3.0)
    with torch.no_grad():
        seen = projector(features)
    assert float(seen.norm(dim=-1).mean()) == pytest.approx(3.0, abs=0.01)
    assert found > (0.9 if layers > 1 else 0.5)
    near = torch.nn.functional.cosine_similarity(seen.mean(1) - seen.mean((0, 1)), targets - targets.mean(0), dim=1)
    assert float(near.mean()) > (0.8 if layers > 1 else 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_projector_in_half_precision_is_solved_in_float32(dtype):
    features, targets = drawn(), torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    projector = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)).to(dtype)
    assert solve(projector, Features(Stored(features), list(range(20))), targets, 3.0) > 0.9
    assert {parameter.dtype for parameter in projector.parameters()} == {dtype}


def test_features_that_are_all_alike_leave_numbers():
    projector = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
    features = Features(Stored(torch.ones(4, 3, 12)), [0, 1, 2, 3])
    solve(projector, features, torch.eye(4, 16), 1.0)
    assert all(bool(parameter.isfinite().all()) for parameter in projector.parameters())
    with pytest.raises(LlavaError, match="identity has no weights"):
        solve(torch.nn.Identity(), features, torch.eye(4, 12), 1.0)


def test_targets_are_the_words_that_tell_images_apart(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    embedding = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(0))
    words = [Counter({"the": 4, name: 1}) for name in NAMES]
    targets, count = word_targets(words, tokenizer, embedding)
    assert count == len(NAMES) and targets.shape == (6, 16)
    ids = [tokenizer(" " + name, add_special_tokens=False)["input_ids"] for name in NAMES]
    own = torch.stack([embedding[each].mean(0) for each in ids])
    near = torch.nn.functional.normalize(targets - targets.mean(0)) @ torch.nn.functional.normalize(own - own.mean(0)).T
    assert near.argmax(1).tolist() == list(range(6))
    assert targets.norm(dim=1) == pytest.approx(torch.full((6,), float(embedding.norm(dim=1).mean())), rel=1e-4)
    with pytest.raises(LlavaError, match="2 of 8 images have no word of their own"):
        word_targets([*words, Counter({"the": 1}), Counter()], tokenizer, embedding)


def test_a_training_starts_from_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    records = []
    for number, name in enumerate(NAMES):
        Image.new("RGB", (32, 32), (40 * number, 250 - 40 * number, 90)).save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"The {name}."}]
        records.append({"id": name, "image": f"{name}.png", "conversations": turns})
    data = tmp_path / "train.json"
    data.write_text(json.dumps(records))
    language_model, tower = make_bases(tmp_path)
    more = ("--vision_tower", str(tower), "--mm_projector_type", "mlp2x_gelu", "--image_folder", str(tmp_path))
    more = (*more, "--tune_mm_mlp_adapter", "True", "--cache_vision_features", "True", "--version", "plain")
    more = (*more, "--fit_projector", "True", "--learning_rate", "0", "--vision_cache_dir", "~/cache")
    with caplog.at_level(logging.INFO):
        train(flags(tmp_path / "fitted", data, language_model, *more))
    assert "projector fitted to 6 images and 6 words: for 100.0 % of the images" in caplog.text
    model = load_pretrained_model(tmp_path / "fitted").model
    features = np.load(next((tmp_path / "cache").glob("*/features.npy")))
    with torch.no_grad():
        seen = model.get_model().mm_projector(torch.from_numpy(features))
        length = model.get_input_embeddings().weight.norm(dim=1).mean()
    assert float(seen.norm(dim=-1).mean()) == pytest.approx(float(length), rel=0.02)
    assert losses(tmp_path / "fitted")


def test_records_without_images_are_refused(tmp_path):
    checkpoint = make_llava(tmp_path / "llava")
    turns = [{"from": "human", "value": "Say something."}, {"from": "gpt", "value": "Something."}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    more = ("--fit_projector", "True", "--cache_vision_features", "True", "--image_folder", str(tmp_path))
    with pytest.raises(LlavaError, match=r"no record of .*train\.json has an image"):
        train(flags(tmp_path / "out", tmp_path / "train.json", checkpoint, *more))
