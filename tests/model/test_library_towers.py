"""Vision models of the library as towers: built, trained, saved, loaded, answered, exported where that can be said."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)

from llava.conversation import get_template
from llava.errors import LlavaError
from llava.generation import Engine, Request, SamplingParams
from llava.images import ImageProcessor
from llava.model import build_model_from_llm, load_pretrained_model, save_model
from llava.model.convert.hf_reader import import_hf
from llava.model.convert.hf_writer import export_hf
from llava.records import read_json, write_json
from llava.train.train import train
from tests.tiny import make_llm, make_tower
from tests.train.helpers import flags, make_records

SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 28, "width": 28},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 3,
}
DINO = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}
CASES = {
    # kind, preprocessing, fields, tokens before the patches, patches
    "siglip": ("siglip_vision_model", SIGLIP, {"patch_size": 7}, 0, 16),
    # Made for 42 px and used with 28, as the released ones are with 518 and 224.
    "dinov2": ("dinov2", DINO, {"image_size": 42}, 1, 4),
    "registers": ("dinov2_with_registers", DINO, {"num_register_tokens": 4}, 5, 4),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    return make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def tower(case, tmp_path_factory) -> Path:
    kind, processor, fields, _, _ = CASES[case]
    return make_tower(tmp_path_factory.mktemp(case) / "tower", kind, processor, **fields)


@pytest.fixture(scope="module")
def trained(tower, llm, tmp_path_factory) -> Path:
    """A LLaVA over the tower, all of it trained for three steps."""
    folder = tmp_path_factory.mktemp("trained")
    more = ("--vision_tower", str(tower), "--unfreeze_mm_vision_tower", "True", "--mm_projector_type", "mlp2x_gelu")
    data = make_records(folder / "data", 4)
    summary = train(flags(folder / "llava", data, llm, *more, "--version", "vicuna_v1", "--max_steps", "3"))
    assert summary["steps"] == 3
    return folder / "llava"


@pytest.fixture(scope="module")
def loaded(trained):
    return load_pretrained_model(trained, device="cpu")


def image(width=50, height=40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels_of(loaded) -> torch.Tensor:
    return torch.from_numpy(loaded.image_processor(image(), loaded.model.config.image_aspect_ratio))


@torch.no_grad()
def logits(loaded, number=-200) -> torch.Tensor:
    ids = torch.tensor([[1, *[number] * loaded.model.num_patches, 300, 301, 302]])
    return loaded.model(input_ids=ids, pixel_values=pixels_of(loaded)).logits


@torch.no_grad()
def library_features(tower: Path, pixels: torch.Tensor, layer: int = -2) -> torch.Tensor:
    return AutoModel.from_pretrained(tower).eval()(pixels, output_hidden_states=True).hidden_states[layer]


@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_features_are_the_librarys_hidden_states_and_nothing_more_is_held(case, tower, llm, layer):
    _, _, _, before, patches = CASES[case]
    loaded = build_model_from_llm(llm, tower, device="cpu", mm_vision_select_layer=layer)
    own = loaded.model.get_vision_tower()
    assert (own.prefix_tokens, own.num_patches, own.hidden_size, own.image_size) == (before, patches, 24, 28)
    pixels = pixels_of(loaded)
    with torch.no_grad():
        found = own(pixels)
    assert torch.equal(found, library_features(tower, pixels, layer)[:, before:])
    held = {name for name, _ in own.named_parameters()}
    assert not any(own.is_unused_layer(name) for name in held)
    blocks = {own.block_of(name) for name in held} - {None}
    assert blocks == set(range(3 + layer + 1 if layer < 0 else layer))


def test_pixels_are_those_of_the_towers_own_processor(tower, loaded, trained):
    try:
        processor = AutoImageProcessor.from_pretrained(tower)
    except ImportError as error:
        pytest.skip(f"this release of transformers has none without torchvision: {' '.join(str(error).split())[:60]}")
    expected = processor(image(), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels_of(loaded), expected, atol=1e-6)
    kind = read_json(tower / "preprocessor_config.json")["image_processor_type"]
    assert read_json(trained / "preprocessor_config.json")["image_processor_type"] == kind
    assert ImageProcessor.find(trained) == ImageProcessor.find(tower)


def test_trained_tower_is_saved_whole_and_loaded(case, tower, trained, loaded):
    own = loaded.model.get_vision_tower()
    saved = {name for name in load_file(trained / "model.safetensors") if "vision_tower" in name}
    assert saved == {f"model.vision_tower.{name}" for name in own.known_names}
    with torch.no_grad():
        moved = own(pixels_of(loaded))
    before = library_features(tower, pixels_of(loaded))[:, own.prefix_tokens :]
    assert moved.shape == before.shape and not torch.allclose(moved, before)
    assert own.weight_prefix == "vision_tower." + "vision_model." * case.startswith("siglip")


def test_names_that_the_library_writes_are_read(loaded, tmp_path):
    """`save_pretrained` alone gives older names to some vision models' weights."""
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    loaded.image_processor.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pretrained_model(tmp_path, device="cpu")), logits(loaded))


def test_engine_answers_as_the_model_alone(loaded):
    conversation = get_template("vicuna_v1")
    conversation.append_message(conversation.roles[0], "<image>\nWhat does the picture show?")
    request = Request(conversation, [image()], SamplingParams(max_new_tokens=8, ignore_eos=True))
    engine = Engine(loaded)
    answer = engine.generate([request])[0]
    ids = torch.from_numpy(engine.prompts.build(request).ids)[None]
    expected = []
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(loaded.model(input_ids=ids, pixel_values=pixels_of(loaded)).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], dim=1)
    assert list(answer.token_ids) == expected
    (view,) = engine.attention_map(request, answer.token_ids).views
    side = loaded.model.get_vision_tower().patches_per_side
    assert view.weights.shape == (8, side, side)


def test_tower_outside_the_checkpoint(tower, llm, tmp_path):
    """What LLaVA's own training leaves: no tower in the checkpoint, its folder named in the config."""
    loaded = build_model_from_llm(llm, tower, device="cpu")
    expected = logits(loaded)
    state = {name: value for name, value in loaded.model.state_dict().items() if "vision_tower" not in name}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded.model.config.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    del config["mm_vision_config"]
    write_json(tmp_path / "config.json", config)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pretrained_model(tmp_path, device="cpu")), expected)


def test_export_gives_the_same_logits_in_transformers_or_says_why_not(case, trained, loaded, tmp_path):
    before = CASES[case][3]
    if before > 1:
        words = f"drops one token before the patches or none, .* has {before}; serve the native"
        with pytest.raises(LlavaError, match=words):
            export_hf(trained, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
        return
    hf = export_hf(trained, tmp_path / "hf")
    model, info = LlavaForConditionalGeneration.from_pretrained(hf, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = read_json(hf / "config.json")
    assert config["vision_feature_select_strategy"] == ("default" if before else "full")
    inputs = AutoProcessor.from_pretrained(hf)(images=image(), text="<image>", return_tensors="pt")
    assert (inputs["pixel_values"] - pixels_of(loaded)).abs().max() < 1e-5
    image_id = model.config.image_token_id
    assert int((inputs["input_ids"] == image_id).sum()) == loaded.model.num_patches == config["image_seq_length"]
    ids = torch.tensor([[1, *[image_id] * loaded.model.num_patches, 300, 301, 302]])
    with torch.no_grad():
        theirs = model.eval()(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    ours = logits(loaded)
    assert (theirs[..., : ours.shape[-1]] - ours).abs().max() < 1e-4
    here = load_pretrained_model(hf, device="cpu")
    assert (logits(here)[..., : ours.shape[-1]] - ours).abs().max() < 1e-4
    back = import_hf(hf, tmp_path / "back")
    first, second = (load_file(path / "model.safetensors") for path in (trained, back))
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    model.save_pretrained(tmp_path / "theirs")
    for path in hf.iterdir():
        if path.is_file() and not (tmp_path / "theirs" / path.name).exists():
            shutil.copy(path, tmp_path / "theirs")
    again = load_pretrained_model(tmp_path / "theirs", device="cpu")
    assert (logits(again)[..., : ours.shape[-1]] - ours).abs().max() < 1e-4, "names as transformers saves them"


def test_export_of_a_padded_model_keeps_the_towers_means(tmp_path, llm):
    tower = make_tower(tmp_path / "tower", "siglip_vision_model", SIGLIP, patch_size=7)
    loaded = build_model_from_llm(llm, tower, device="cpu", mm_projector_type="mlp2x_gelu", image_aspect_ratio="pad")
    save_model(tmp_path / "llava", loaded.model, loaded.tokenizer, loaded.image_processor)
    hf = export_hf(tmp_path / "llava", tmp_path / "hf")
    theirs = AutoProcessor.from_pretrained(hf)(images=image(), text="<image>", return_tensors="pt")["pixel_values"]
    assert (theirs - pixels_of(loaded)).abs().max() < 1e-5
    assert load_pretrained_model(hf, device="cpu").model.config.image_aspect_ratio == "pad"


def test_class_token_and_registers_can_be_kept(llm, tmp_path):
    kind, processor, fields, before, patches = CASES["registers"]
    tower = make_tower(tmp_path / "tower", kind, processor, **fields)
    loaded = build_model_from_llm(llm, tower, device="cpu", mm_vision_select_feature="cls_patch")
    assert loaded.model.num_patches == before + patches
    save_model(tmp_path / "llava", loaded.model, loaded.tokenizer, loaded.image_processor)
    hf = export_hf(tmp_path / "llava", tmp_path / "hf")
    assert read_json(hf / "config.json")["vision_feature_select_strategy"] == "full"
    model = LlavaForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    ids = torch.tensor([[1, *[model.config.image_token_id] * loaded.model.num_patches, 300, 301, 302]])
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=pixels_of(loaded)).logits
    ours = logits(loaded)
    assert (theirs[..., : ours.shape[-1]] - ours).abs().max() < 1e-4


def test_folder_with_a_text_half(llm, tmp_path):
    """Google's folders hold both halves of SigLIP."""
    alone = make_tower(tmp_path / "alone", "siglip_vision_model", SIGLIP, patch_size=7)
    vision = {name: value for name, value in read_json(alone / "config.json").items() if name != "dtype"}
    text = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    whole.vision_model.load_state_dict(AutoModel.from_pretrained(alone).state_dict())
    whole.save_pretrained(tmp_path / "whole")
    shutil.copy(alone / "preprocessor_config.json", tmp_path / "whole")
    one, other = (build_model_from_llm(llm, tmp_path / name, device="cpu") for name in ("alone", "whole"))
    pixels = pixels_of(one)
    with torch.no_grad():
        assert torch.equal(one.model.get_vision_tower()(pixels), other.model.get_vision_tower()(pixels))


@pytest.mark.parametrize(
    ("kind", "fields", "mm_fields", "words"),
    [
        ("siglip_vision_model", {}, {"mm_vision_select_feature": "cls_patch"}, "has no class token; use patch"),
        ("dinov2", {}, {"mm_vision_select_layer": -4}, "needs at least one block"),
        ("dinov2", {}, {"mm_vision_select_layer": 7}, "doesn't exist: the vision tower has 3 blocks"),
        ("dinov2", {"use_swiglu_ffn": True}, {}, "joined from two; write the tower anew .*save_original_format=False"),
        ("vit", {"image_size": 42}, {}, "ViTModel doesn't run on images of 28 x 28 pixels .*can't be a tower"),
        ("vit_mae", {}, {}, "fewer than its 2 x 2 patches; it can't be a tower"),
        ("convnext", {}, {}, "can't be a tower"),
    ],
)
def test_what_cannot_be_a_tower_is_refused_in_words(llm, tmp_path, kind, fields, mm_fields, words):
    tower = make_tower(tmp_path, kind, DINO, **fields)
    if words.startswith("joined") and any(
        "weights_in" in name for name in AutoModel.from_pretrained(tower).state_dict()
    ):
        pytest.skip("this release of transformers computes with joined weights")
    with pytest.raises(LlavaError, match=words):
        build_model_from_llm(llm, tower, device="cpu", **mm_fields)


def test_joined_weights_written_anew_are_read(llm, tmp_path):
    """What the message above advises."""
    tower = make_tower(tmp_path / "joined", "dinov2", DINO, use_swiglu_ffn=True)
    model = AutoModel.from_pretrained(tower).eval()
    model.save_pretrained(tmp_path / "apart", save_original_format=False)
    shutil.copy(tower / "preprocessor_config.json", tmp_path / "apart")
    loaded = build_model_from_llm(llm, tmp_path / "apart", device="cpu")
    with torch.no_grad():
        found = loaded.model.get_vision_tower()(pixels_of(loaded))
    assert torch.equal(found, library_features(tower, pixels_of(loaded))[:, 1:])


def test_preprocessing_that_is_missing_is_not_guessed(llm, tmp_path):
    tower = make_tower(tmp_path, "siglip_vision_model", SIGLIP)
    (tower / "preprocessor_config.json").unlink()
    with pytest.raises(LlavaError, match=r"'siglip_vision_model' needs its preprocessor_config\.json"):
        build_model_from_llm(llm, tower, device="cpu")


def test_a_strategy_that_drops_a_patch_is_refused(llm, tmp_path):
    """`default` drops the first token, which of SigLIP is a patch."""
    tower = make_tower(tmp_path / "tower", "siglip_vision_model", SIGLIP)
    loaded = build_model_from_llm(llm, tower, device="cpu", mm_projector_type="mlp2x_gelu")
    save_model(tmp_path / "llava", loaded.model, loaded.tokenizer, loaded.image_processor)
    hf = export_hf(tmp_path / "llava", tmp_path / "hf")
    config = read_json(hf / "config.json")
    theirs = {name: value for name, value in config.items() if name != "mm_vision_select_feature"}
    write_json(hf / "config.json", theirs)
    assert load_pretrained_model(hf, device="cpu").model.config.mm_vision_select_feature == "patch"
    write_json(hf / "config.json", theirs | {"vision_feature_select_strategy": "default"})
    with pytest.raises(LlavaError, match="'default' drops one token of each image, but the vision tower has 0"):
        load_pretrained_model(hf, device="cpu")
