"""The CLIP tower: the numbers of transformers' hidden states, and no layer behind the selected one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from llava.errors import LlavaError
from llava.model import build_model_from_llm, load_pretrained_model, save_model
from llava.model.towers import read_vision_config
from llava.model.towers.base import used_layers
from llava.model.towers.clip import CLIP_PREFIX, CLIPVisionTower, known_vision_config
from tests.tiny import make_clip, make_llm

LAYERS = 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("llm"))


def build(llm, clip, **fields):
    return build_model_from_llm(llm, clip, device="cpu", **fields).model


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_features_are_the_selected_hidden_state(llm, clip, layer, feature):
    model = build(llm, clip, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    whole = CLIPVisionModel.from_pretrained(clip).eval()
    pixel_values = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        expected = whole(pixel_values, output_hidden_states=True).hidden_states[layer]
        found = model.get_vision_tower()(pixel_values)
    expected = expected[:, 1:] if feature == "patch" else expected
    assert found.shape == (2, model.num_patches, 24)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("layer", "blocks"), [(-2, 2), (-1, 3), (1, 1)])
def test_layers_behind_are_not_in_memory(llm, clip, layer, blocks):
    names = [name for name, _ in build(llm, clip, mm_vision_select_layer=layer).named_parameters()]
    held = {name.split("encoder.layers.")[1].split(".")[0] for name in names if "encoder.layers." in name}
    assert held == {str(block) for block in range(blocks)}
    assert not any("post_layernorm" in name for name in names)


@pytest.mark.parametrize("layer", [-5, 4])
def test_layer_that_does_not_exist(llm, clip, layer):
    with pytest.raises(LlavaError, match=rf"mm_vision_select_layer {layer} doesn't exist: .* 3 blocks.*-4 to 3"):
        build(llm, clip, mm_vision_select_layer=layer)


def test_used_layers():
    assert [used_layers(layer, 24) for layer in (-2, -1, 0, 24, -25)] == [23, 24, 0, 24, 0]


def test_unknown_feature(llm, clip):
    with pytest.raises(LlavaError, match="patch or cls_patch, not 'cls'"):
        build(llm, clip, mm_vision_select_feature="cls")


def test_folder_of_a_whole_clip(llm, clip, tmp_path):
    """OpenAI's folders hold text and vision half; `vision_model.` stands before the names."""
    vision = json.loads((clip / "config.json").read_text())
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    whole.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(clip).state_dict())
    whole.save_pretrained(tmp_path)
    assert any(name.startswith("text_model.") for name in load_file(tmp_path / "model.safetensors"))
    pixel_values = torch.rand(1, 3, 28, 28)
    with torch.no_grad():
        found = build(llm, tmp_path).get_vision_tower()(pixel_values)
        assert torch.equal(found, build(llm, clip).get_vision_tower()(pixel_values))


def test_folder_that_is_no_clip(llm, tmp_path):
    with pytest.raises(LlavaError, match=r"not a vision tower .*'llama'"):
        build(llm, llm)


def test_half_precision_images_are_cast(llm, clip):
    tower = build(llm, clip).get_vision_tower()
    pixel_values = torch.rand(1, 3, 28, 28).half()
    with torch.no_grad():
        assert tower(pixel_values).dtype == torch.float32


def test_known_towers_are_those_of_openai():
    config = known_vision_config("openai/clip-vit-large-patch14-336")
    with torch.device("meta"):
        tower = CLIPVisionTower(config)
    assert (tower.hidden_size, tower.image_size, tower.num_patches) == (1024, 336, 576)
    assert len(tower.vision_tower.vision_model.encoder.layers) == 23
    assert config["num_attention_heads"] == 16 and config["hidden_act"] == "quick_gelu"
    assert known_vision_config("somebody/clip") is None


def test_blocks_behind_are_saved_with_the_checkpoint(llm, clip, tmp_path):
    """Other programs read the whole tower from a checkpoint, so its last block isn't lost in ours."""
    loaded = build_model_from_llm(llm, clip, device="cpu")
    save_model(tmp_path / "a", loaded.model, loaded.tokenizer, loaded.image_processor)
    again = load_pretrained_model(tmp_path / "a", device="cpu")
    save_model(tmp_path / "b", again.model, again.tokenizer)
    whole = CLIPVisionModel.from_pretrained(clip).state_dict()
    for folder in ("a", "b"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert {name.removeprefix(CLIP_PREFIX) for name in saved if "vision_tower" in name} == set(whole)
        for name, tensor in whole.items():
            assert torch.equal(saved[CLIP_PREFIX + name], tensor), name


def test_read_vision_config_has_all_fields(clip):
    config = read_vision_config(clip)
    assert config["image_size"] == 28 and config["hidden_act"] == "quick_gelu" and config["num_channels"] == 3
