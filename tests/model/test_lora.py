"""LoRA folders: the sum equals peft's own merge, and an adapter that doesn't fit is an error."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.model.checkpoint.adapter import native_name
from tests.model.checkpoints import PROJECTOR, TOWER, Tiny, logits, save

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"), "mistral", mm_projector_type="linear")


def make_adapter(tiny, folder, **settings):
    """An adapter by peft, with random halves, and the logits of the model that peft merges it into."""
    model = load_pretrained_model(tiny.folder, device="cpu").model
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | settings
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return logits(wrapped.merge_and_unload())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 32}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save"],
)
def test_sum_is_that_of_peft(tiny, tmp_path, settings):
    expected = make_adapter(tiny, tmp_path / "a", **settings)
    loaded = load_pretrained_model(tmp_path / "a", tiny.folder, device="cpu")
    assert not torch.allclose(expected, logits(load_pretrained_model(tiny.folder, device="cpu").model), atol=1e-2)
    assert torch.allclose(logits(loaded.model), expected, atol=1e-5)
    assert loaded.model.config.conversation_template == "mistral_instruct"


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_llava_folder_over_a_language_model(tiny, tmp_path, suffix):
    """Adapter, projector beside it, config: as LLaVA's training writes it over a language model's folder."""
    folder = tmp_path / "a"
    expected = make_adapter(tiny, folder)
    (folder / "config.json").write_text(json.dumps(tiny.reference_config()))
    others = {f"base_model.model.{name}": tensor for name, tensor in tiny.only(PROJECTOR).items()}
    save(others, folder / f"non_lora_trainables{suffix}")
    loaded = load_pretrained_model(folder, tiny.llm, device="cpu")
    assert torch.allclose(logits(loaded.model), expected, atol=1e-5)


def test_tuned_tower_beside_the_adapter_is_used(tiny, tmp_path):
    folder = tmp_path / "a"
    make_adapter(tiny, folder)
    (folder / "config.json").write_text(json.dumps(tiny.reference_config()))
    others = tiny.only(PROJECTOR) | {name: tensor * 2 for name, tensor in tiny.only(TOWER).items()}
    save({f"base_model.model.{name}": tensor for name, tensor in others.items()}, folder / "non_lora_trainables.bin")
    model = load_pretrained_model(folder, tiny.llm, device="cpu").model
    name = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"
    assert torch.equal(model.state_dict()[name], tiny.tensors[name] * 2)


@pytest.mark.parametrize(
    ("written", "native"),
    [
        ("base_model.model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_native_name(written, native):
    assert native_name(written) == native


def write_adapter(folder, tensors, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    save(tensors, folder / "adapter_model.safetensors")
    return folder


def halves(module, a=(2, 32), b=(64, 2)):
    return {
        f"base_model.model.{module}.lora_A.weight": torch.ones(a),
        f"base_model.model.{module}.lora_B.weight": torch.ones(b),
    }


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (halves("model.layers.7.mlp.up_proj"), {}, r"changes model\.layers\.7\.mlp\.up_proj\.weight .*doesn't have"),
        (halves(UP, b=(63, 2)), {}, r"update of model\.layers\.1\.mlp\.up_proj\.weight has shape \[63, 32\]"),
        (dict([*halves(UP).items()][:1]), {}, "has lora_A but not its other half"),
        (halves(UP), {"use_dora": True}, "DoRA aren't supported; merge it"),
        ({}, {"peft_type": "IA3"}, "IA3 aren't supported"),
        ({"base_model.model.x.lora_embedding_A": torch.ones(1)}, {}, "no part of a plain LoRA"),
        (halves(UP) | {"base_model.model.model.strange": torch.ones(1)}, {}, "unexpected tensor .*strange"),
    ],
)
def test_adapter_that_does_not_fit(tiny, tmp_path, tensors, config, message):
    folder = write_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(LlavaError, match=message):
        load_pretrained_model(folder, tiny.folder, device="cpu")


def test_adapter_over_quantized_weights_is_refused(tiny, tmp_path):
    folder = write_adapter(tmp_path / "a", halves(UP))
    base = tiny.copy(tmp_path / "base")
    save(tiny.tensors | {f"{UP}.SCB": torch.ones(64)}, base / "model.safetensors")
    with pytest.raises(LlavaError, match="stored in 8 or 4 bits"):
        load_pretrained_model(folder, base, device="cpu")


def test_adapter_without_weights(tiny, tmp_path):
    folder = write_adapter(tmp_path / "a", {})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LlavaError, match=r"no adapter weights found \(looked for adapter_model\.safetensors"):
        load_pretrained_model(folder, tiny.folder, device="cpu")
