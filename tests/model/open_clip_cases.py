"""What a tower of open_clip has to do; run by test_open_clip_tower.py in a process of its own."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

if os.path.isdir(os.environ.get("LLAVA_OPENCLIP_DIR", "")):
    sys.path.insert(0, os.environ["LLAVA_OPENCLIP_DIR"])
    # torchvision's own library doesn't load beside a CPU build of torch; timm and open_clip never call these two.
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from open_clip.timm_model import TimmModel

from llava.constants import SCHEME_PATCH
from llava.errors import LlavaError
from llava.model import build_model_from_llm, load_pretrained_model
from llava.tokenization import ImageTokens, expand_images, tokenize_prompt
from llava.train.train import train
from tests.model.checkpoints import save
from tests.tiny import make_llm
from tests.train.helpers import flags, make_records

NAME, SIZE, PATCHES, WIDTH, BLOCKS = "test_vit", 160, 100, 64, 6
TRUNK = "model.vision_tower.vision_tower.trunk."


@pytest.fixture(scope="module")
def open_clip_model():
    torch.manual_seed(0)
    return TimmModel(NAME, embed_dim=8, image_size=SIZE, pool="", proj="linear").eval()


@pytest.fixture(scope="module")
def tower(open_clip_model, tmp_path_factory):
    """A folder as BiomedCLIP's on the hub: its config, and one pickle of both halves."""
    folder = tmp_path_factory.mktemp("tower")
    vision = {"timm_model_name": NAME, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    content = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": vision | {"image_size": SIZE}, "text_cfg": {"context_length": 256}},
        "preprocess_cfg": {"mean": [0.48, 0.45, 0.4], "std": [0.26, 0.26, 0.27]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    tensors = {f"visual.{name}": tensor for name, tensor in open_clip_model.state_dict().items()}
    tensors |= {"logit_scale": torch.ones(()), "text.transformer.embeddings.word_embeddings.weight": torch.ones(2, 2)}
    save(tensors, folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("llm"))


def hidden_state(open_clip_model, pixel_values, block):
    """What block `block` gives in the whole model."""
    found = []
    hook = open_clip_model.trunk.blocks[block].register_forward_hook(lambda *args: found.append(args[2]))
    with torch.no_grad():
        open_clip_model(pixel_values)
    hook.remove()
    return found[0]


@pytest.mark.parametrize(("layer", "feature"), [(-2, "patch"), (-1, "cls_patch"), (3, "patch")])
def test_features_are_those_of_open_clip(open_clip_model, tower, llm, layer, feature):
    fields = {"mm_vision_select_layer": layer, "mm_vision_select_feature": feature}
    model = build_model_from_llm(llm, tower, device="cpu", **fields).model
    pixel_values = torch.rand(2, 3, SIZE, SIZE)
    expected = hidden_state(open_clip_model, pixel_values, BLOCKS + layer if layer < 0 else layer - 1)
    with torch.no_grad():
        found = model.get_vision_tower()(pixel_values)
    assert found.shape == (2, PATCHES + (feature == "cls_patch"), WIDTH)
    assert torch.equal(found, expected[:, 1:] if feature == "patch" else expected)
    blocks = len(model.get_vision_tower().vision_tower.trunk.blocks)
    assert blocks == (BLOCKS + 1 + layer if layer < 0 else layer)


def test_trained_saved_and_loaded(open_clip_model, tower, llm, tmp_path):
    data = make_records(tmp_path / "data", 4)
    common = ("--max_steps", "2", "--version", "v0")
    tokens = ("--mm_image_token_scheme", "patch", "--mm_use_im_start_end", "True")
    stage1 = ("--vision_tower", str(tower), "--tune_mm_mlp_adapter", "True", *tokens, *common)
    train(flags(tmp_path / "stage1", data, llm, *stage1))
    first = load_file(tmp_path / "stage1" / "model.safetensors")
    trunk = {f"{TRUNK}{name}": tensor for name, tensor in open_clip_model.trunk.state_dict().items()}
    assert {name for name in first if "vision_tower" in name} == set(trunk), "the last block too"
    assert all(torch.equal(first[name], tensor) for name, tensor in trunk.items()), "frozen in stage 1"

    train(flags(tmp_path / "stage2", data, tmp_path / "stage1", "--unfreeze_mm_vision_tower", "True", *common))
    second = load_file(tmp_path / "stage2" / "model.safetensors")
    changed = {name for name in trunk if not torch.equal(first[name], second[name])}
    assert f"{TRUNK}blocks.0.attn.qkv.weight" in changed
    assert not any(f"blocks.{BLOCKS - 1}." in name or "trunk.norm." in name for name in changed), "they aren't run"

    loaded = load_pretrained_model(tmp_path / "stage2", device="cpu")
    config = loaded.model.config
    assert (config.mm_image_token_scheme, config.mm_hidden_size) == (SCHEME_PATCH, WIDTH)
    assert loaded.image_processor.image_mean == (0.48, 0.45, 0.4)
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], second[name]) for name in changed)
    answer(loaded)


def answer(loaded):
    """The trained model goes on after an image and a question."""
    image_tokens = ImageTokens.from_config(loaded.model.config, loaded.tokenizer)
    ids = tokenize_prompt("Which colour?\n<image>###", loaded.tokenizer, image_tokens)
    ids, _ = expand_images(ids, None, [loaded.model.num_patches])
    assert list(ids).count(-200) == PATCHES
    inputs = torch.tensor([list(ids)])
    output = loaded.model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        pixel_values=torch.rand(1, 3, SIZE, SIZE),
        max_new_tokens=3,
        do_sample=False,
    )
    assert output.shape[1] > inputs.shape[1]


def test_v10_checkpoint_with_its_tower_outside(open_clip_model, tower, llm, tmp_path):
    """The layout of LLaVA-Med v1.0 with BiomedCLIP: LLaMA and Linear inside, the tower in its own folder."""
    from llava.model import save_model

    made = build_model_from_llm(llm, tower, device="cpu", mm_image_token_scheme="patch", mm_use_im_start_end=True)
    folder = tmp_path / "checkpoint"
    save_model(folder, made.model, made.tokenizer)
    weights = load_file(folder / "model.safetensors")
    save({name: tensor for name, tensor in weights.items() if "vision_tower" not in name}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llava", "mm_vision_tower": str(tower)}
    later = ("mm_vision_config", "mm_image_token_scheme", "mm_projector_type", "mm_use_im_patch_token")
    for name in (*later, "mm_vision_select_feature", "conversation_template"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_pretrained_model(folder, device="cpu")
    assert loaded.model.config.mm_image_token_scheme == SCHEME_PATCH
    pixel_values = torch.rand(1, 3, SIZE, SIZE)
    expected = hidden_state(open_clip_model, pixel_values, BLOCKS - 2)[:, 1:]
    with torch.no_grad():
        assert torch.equal(loaded.model.get_vision_tower()(pixel_values), expected)


def test_missing_block_is_named(open_clip_model, tower, llm, tmp_path):
    tensors = {f"visual.{name}": tensor for name, tensor in open_clip_model.state_dict().items()}
    del tensors["visual.trunk.blocks.2.mlp.fc1.bias"]
    save(tensors, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text((tower / "open_clip_config.json").read_text())
    with pytest.raises(
        LlavaError, match=r"missing tensor .*trunk\.blocks\.2\.mlp\.fc1\.bias; looked in .*open_clip_model"
    ):
        build_model_from_llm(llm, tmp_path, device="cpu")


def test_folder_without_weights(tower, llm, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((tower / "open_clip_config.json").read_text())
    with pytest.raises(LlavaError, match=r"no open_clip weights found \(looked for open_clip_model\.safetensors"):
        build_model_from_llm(llm, tmp_path, device="cpu")


@pytest.mark.parametrize(("name", "message"), [("resnet10t", "is no ViT"), ("no_such_model", "can't build")])
def test_other_trunks(llm, tmp_path, name, message):
    content = {"model_cfg": {"vision_cfg": {"timm_model_name": name}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(LlavaError, match=message):
        build_model_from_llm(llm, tmp_path, device="cpu")
