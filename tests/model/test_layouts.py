"""Each released layout gives back the model that it was written from, and what isn't a model is refused."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava.constants import SCHEME_PATCH, SCHEME_PLACEHOLDER
from llava.errors import LlavaError
from llava.model import LlavaMistralForCausalLM, build_model_from_llm, load_pretrained_model
from llava.model.convert.projector_extract import extract_projector
from llava.model.towers.clip import CLIP_PREFIX
from llava.records import read_json
from tests.model.checkpoints import PROJECTOR, TOWER, Tiny, logits, save, write
from tests.tiny import make_llava


@pytest.fixture(scope="module")
def v10(tmp_path_factory):
    fields = {"mm_image_token_scheme": "patch", "mm_use_im_start_end": True, "mm_projector_type": "linear"}
    return Tiny(tmp_path_factory.mktemp("v10"), "llama", **fields)


@pytest.fixture(scope="module")
def v15(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("v15"), "mistral", mm_projector_type="mlp2x_gelu", image_aspect_ratio="pad")


@pytest.fixture(scope="module")
def llava15(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("llava15"), "llama", mm_projector_type="mlp2x_gelu")


@pytest.fixture(scope="module")
def expected():
    """The logits of a tiny model as it was made."""
    cache = {}

    def of(tiny: Tiny) -> torch.Tensor:
        if tiny.root not in cache:
            cache[tiny.root] = logits(load_pretrained_model(tiny.folder, device="cpu").model)
        return cache[tiny.root]

    return of


def v10_config(tiny: Tiny) -> dict:
    config = tiny.reference_config(model_type="llava", vocab_size=tiny.config["vocab_size"])
    for later in ("mm_projector_type", "mm_use_im_patch_token", "mm_vision_select_feature", "image_aspect_ratio"):
        config.pop(later)
    return config


def test_v10_linear_projector_tower_outside(v10, expected, tmp_path):
    # As transformers 4.28 wrote it: rotary tables stored, .bin, tower apart.
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = write(tmp_path / "a", v10.without(TOWER) | tables, v10_config(v10), v10.folder, "pytorch_model.bin")
    loaded = load_pretrained_model(folder, device="cpu")
    config = loaded.model.config
    assert (config.mm_image_token_scheme, config.mm_use_im_start_end) == (SCHEME_PATCH, True)
    assert config.conversation_template == "simple"
    assert torch.equal(logits(loaded.model), expected(v10))


def test_v15_uses_the_tower_in_the_checkpoint(v15, expected, tmp_path):
    tuned = {name: tensor * 1.5 if name.startswith(TOWER) else tensor for name, tensor in v15.tensors.items()}
    config = v15.reference_config(unfreeze_mm_vision_tower=True)
    loaded = load_pretrained_model(write(tmp_path / "a", tuned, config, v15.folder), device="cpu")
    assert isinstance(loaded.model, LlavaMistralForCausalLM)
    assert loaded.model.config.conversation_template == "mistral_instruct"
    assert loaded.model.config.image_aspect_ratio == "pad"
    name = CLIP_PREFIX + "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(loaded.model.state_dict()[name], v15.tensors[name] * 1.5)
    assert not torch.allclose(logits(loaded.model), expected(v15), atol=1e-3)


def test_v15_needs_no_tower_folder_if_its_own_config_is_known(v15, expected, tmp_path):
    config = v15.reference_config(mm_vision_tower="nowhere/at-all", mm_vision_config=v15.config["mm_vision_config"])
    loaded = load_pretrained_model(write(tmp_path / "a", v15.tensors, config, v15.folder), device="cpu")
    assert torch.equal(logits(loaded.model), expected(v15))


def test_llava15_tower_outside(llava15, expected, tmp_path):
    folder = write(tmp_path / "a", llava15.without(TOWER), llava15.reference_config(), llava15.folder)
    loaded = load_pretrained_model(folder, device="cpu")
    assert loaded.model.config.mm_image_token_scheme == SCHEME_PLACEHOLDER
    assert loaded.model.config.conversation_template == "vicuna_v1"
    assert torch.equal(logits(loaded.model), expected(llava15))


def test_old_llava_type_with_later_fields_is_llava15(llava15, tmp_path):
    config = llava15.reference_config(model_type="llava")
    loaded = load_pretrained_model(write(tmp_path / "a", llava15.without(TOWER), config, llava15.folder), device="cpu")
    assert loaded.model.config.mm_image_token_scheme == SCHEME_PLACEHOLDER


def test_babydoctor_is_one_linear_over_llama_2(v10, tmp_path):
    config = v10.reference_config(mm_use_im_start_end=False, max_position_embeddings=4096)
    loaded = load_pretrained_model(write(tmp_path / "a", v10.without(TOWER), config, v10.folder), device="cpu")
    assert loaded.model.config.conversation_template == "llava_llama_2"


def test_template_can_be_named(llava15):
    loaded = load_pretrained_model(llava15.folder, device="cpu", conversation_template="llava_v1")
    assert loaded.model.config.conversation_template == "llava_v1"


def test_tower_folder_beside_the_checkpoint(llava15, expected, tmp_path):
    (tmp_path / "clip").symlink_to(llava15.clip)
    config = llava15.reference_config(mm_vision_tower="clip")
    loaded = load_pretrained_model(write(tmp_path / "a", llava15.without(TOWER), config, llava15.folder), device="cpu")
    assert torch.equal(logits(loaded.model), expected(llava15))


def test_sharded(v15, expected, tmp_path):
    names = list(v15.tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    folder = write(tmp_path / "a", None, v15.config, v15.folder)
    for file, part in parts.items():
        save({name: v15.tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load_pretrained_model(folder, device="cpu").model), expected(v15))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_projector_folder(llava15, expected, tmp_path, suffix):
    folder = write(tmp_path / "a", llava15.only(PROJECTOR), llava15.reference_config(), name=f"mm_projector{suffix}")
    loaded = load_pretrained_model(folder, llava15.llm, device="cpu")
    assert torch.equal(logits(loaded.model), expected(llava15))


def test_projector_folder_with_trained_token_rows(v10, expected, tmp_path, caplog):
    rows = v10.tensors["model.embed_tokens.weight"]
    old = rows.shape[0] - 3
    trained = v10.only(PROJECTOR) | {"model.embed_tokens.weight": rows[old:]}
    config = v10.reference_config(mm_image_token_scheme="patch", mm_use_im_start_end=True)
    folder = write(tmp_path / "a", trained, config, v10.folder, "mm_projector.bin")
    with caplog.at_level(logging.WARNING):
        loaded = load_pretrained_model(folder, v10.llm, device="cpu")
    assert torch.equal(loaded.model.get_input_embeddings().weight, rows)
    head = loaded.model.lm_head.weight
    assert torch.allclose(head[old:], head[:old].mean(dim=0).expand(3, -1), atol=1e-6)
    assert "3 new rows of lm_head.weight" in caplog.text


@pytest.mark.parametrize("tower_layout", ["vision_tower.", "model.vision_tower."])
def test_hf_layout(llava15, expected, tmp_path, tower_layout):
    folder = tmp_path / "hf"
    config = LlavaConfig(
        text_config={**_text_config(llava15), "model_type": "llama"},
        vision_config=llava15.config["mm_vision_config"],
        image_token_index=llava15.config["vocab_size"] - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    model = LlavaForConditionalGeneration(config)
    state = {}
    for name, tensor in llava15.tensors.items():
        hf_name = name.replace(CLIP_PREFIX, "model.vision_tower.").replace(
            "model.mm_projector.0.", "model.multi_modal_projector.linear_1."
        )
        hf_name = hf_name.replace("model.mm_projector.2.", "model.multi_modal_projector.linear_2.")
        for part in ("embed_tokens", "layers", "norm"):
            if hf_name.startswith(f"model.{part}."):
                hf_name = "model.language_model." + hf_name.removeprefix("model.")
        state[hf_name] = tensor
    model.load_state_dict(state)
    write(folder, None, None, llava15.folder)
    if tower_layout == "vision_tower.":
        model.save_pretrained(folder)  # the older names, which transformers still writes
    else:
        save(model.state_dict(), folder / "model.safetensors")
        config.save_pretrained(folder)
    loaded = load_pretrained_model(folder, device="cpu")
    assert loaded.model.config.mm_projector_type == "mlp2x_gelu"
    assert torch.equal(logits(loaded.model), expected(llava15))


def _text_config(tiny: Tiny) -> dict:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: tiny.config[name] for name in (*names, "num_key_value_heads", "max_position_embeddings")}


def test_delta_is_refused_with_the_command(v10, tmp_path):
    delta = {name: tensor * 0.01 for name, tensor in v10.without(TOWER).items()}
    folder = write(tmp_path / "a", delta, v10_config(v10), v10.folder)
    with pytest.raises(LlavaError, match=r"delta weights.*llava-med apply-delta --base .* --delta .*a --target"):
        load_pretrained_model(folder, device="cpu")


@pytest.mark.parametrize("over_it", ["projector", "adapter", "new model"])
def test_a_delta_is_no_base_either(tmp_path, over_it):
    """Loaded as one it would answer, but as nobody has trained it."""
    llava = make_llava(tmp_path)
    delta = write(
        tmp_path / "delta",
        {name: tensor * 0.01 for name, tensor in load_file(tmp_path / "llm" / "model.safetensors").items()},
        read_json(tmp_path / "llm" / "config.json"),
        tmp_path / "llm",
    )
    with pytest.raises(LlavaError, match=r"delta holds delta weights.*llava-med apply-delta --base"):
        if over_it == "projector":
            extract_projector(llava, tmp_path / "projector")
            load_pretrained_model(tmp_path / "projector", delta, device="cpu")
        elif over_it == "adapter":
            loaded = load_pretrained_model(llava, device="cpu")
            peft = get_peft_model(loaded.model, LoraConfig(r=4, target_modules=["q_proj"]))
            peft.save_pretrained(tmp_path / "adapter")
            loaded.model.config.save_pretrained(tmp_path / "adapter")
            load_pretrained_model(tmp_path / "adapter", delta, device="cpu")
        else:
            build_model_from_llm(delta, tmp_path / "clip", device="cpu")


def test_adapter_is_refused_with_the_command(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    folder = write(
        tmp_path / "a",
        {
            "base_model.model.model.x.lora_A.weight": torch.ones(1, 2),
            "base_model.model.model.x.lora_B.weight": torch.ones(2, 1),
        },
        None,
        name="adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LlavaError, match=r"LoRA adapter.*--model-base some/base.*llava-med merge-lora"):
        load_pretrained_model(folder, device="cpu")


def test_projector_alone_is_refused_with_the_flag(llava15, tmp_path):
    folder = write(tmp_path / "a", llava15.only(PROJECTOR), llava15.reference_config(), name="mm_projector.bin")
    with pytest.raises(LlavaError, match=r"projector only.*--model-base"):
        load_pretrained_model(folder, device="cpu")


def test_language_model_is_refused(llava15):
    with pytest.raises(LlavaError, match="without a vision tower"):
        load_pretrained_model(llava15.llm, device="cpu")


def test_folder_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(LlavaError, match=r"no weights found.*model\.safetensors.*mm_projector"):
        load_pretrained_model(tmp_path, device="cpu")


def test_missing_image_tokens(v10, tmp_path):
    folder = write(
        tmp_path / "a",
        v10.without(TOWER),
        v10.reference_config(mm_use_im_start_end=True, vocab_size=v10.config["vocab_size"]),
        v10.llm,
    )
    config = json.loads((folder / "config.json").read_text())
    # The checkpoint has rows for the three tokens, its tokenizer lost them.
    loaded = load_pretrained_model(folder, device="cpu")
    assert "<im_start>" in loaded.tokenizer.get_vocab()
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 3}))
    with pytest.raises(LlavaError, match=r"<im_start>, <im_end>.*tokenizer doesn't have them"):
        load_pretrained_model(folder, device="cpu")


def test_a_named_tower_that_is_not_used_is_said(v15, tmp_path, caplog):
    config = v15.reference_config(mm_vision_tower="clip", mm_vision_config=v15.config["mm_vision_config"])
    folder = write(tmp_path / "a", v15.tensors, config, v15.folder)
    load_pretrained_model(folder, device="cpu", vision_tower="clip")
    assert "not used" not in caplog.text
    load_pretrained_model(folder, device="cpu", vision_tower="another/tower")
    assert f"vision tower another/tower: not used; {folder} holds its own, trained with it (clip)" in caplog.text
