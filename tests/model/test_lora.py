"""LoRA folders: the sum equals peft's own merge, and an adapter that doesn't fit is an error."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.model.checkpoint import adapter
from llava.model.checkpoint.adapter import native_name
from llava.model.export_hf import main as export_hf
from llava.records import read_json, write_json
from tests.model.checkpoints import PROJECTOR, TOWER, Tiny, logits, save

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"), "mistral", mm_projector_type="linear")


def make_adapter(tiny, folder, **settings):
    """An adapter by peft, with random halves; the logits of the model that peft merges it into once it is loaded."""
    model = load_pretrained_model(tiny.folder, device="cpu").model
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | settings
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    # From the file: peft sorts the keys of patterns there, of which the first counts.
    model = load_pretrained_model(tiny.folder, device="cpu").model
    return logits(PeftModel.from_pretrained(model, folder).merge_and_unload())


def randomise(wrapped):
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 32}},
        {"modules_to_save": ["lm_head"]},
        {"alpha_pattern": {"layers.1.mlp.up_proj": 40, "up_proj": 2}},
        {"alpha_pattern": {"q_proj|up_proj": 32}, "rank_pattern": {"q_proj|up_proj": 2}},
        {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 32, "proj": 5, r".*\.q_proj": 7}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
    ],
    ids=repr,
)
def test_sum_is_that_of_peft(tiny, tmp_path, settings):
    try:
        expected = make_adapter(tiny, tmp_path / "a", **settings)
    except ValueError as error:
        if "Unknown initialization" in str(error):
            pytest.skip("this release of peft doesn't have it")
        raise
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
        (halves(UP), {"alora_invocation_tokens": [1, 2]}, "activated LoRA aren't supported"),
        (halves(UP), {"trainable_token_indices": [5]}, "LoRA with trainable_token_indices aren't supported"),
        (halves(UP), {"fourier_depth": 3}, "LoRA with fourier_depth, which isn't known, aren't supported"),
        (halves(UP), {"lora_alpha": None}, "'lora_alpha' has the value None"),
        (halves(UP), {"alpha_pattern": {"(": 3}}, r"'\(' has the value 3"),
        (halves(UP), {"alpha_pattern": {"(|.)" * 40 + "!": 3}}, "may have no groups and one repetition"),
        (halves(UP), {"alpha_pattern": {"[a-z.]*[a-z.]*!": 3}}, "may have no groups and one repetition"),
        (halves(UP), {"alpha_pattern": {f".*{number}": 3 for number in range(17)}}, "one repetition, 16 in all"),
        (halves("model." * 50 + "up_proj"), {}, "is longer than 300 characters"),
        (halves(UP) | {"model.embed_tokens.weight": torch.ones(0)}, {}, "has no values; likely .*ZeRO-3"),
        (halves(UP, a=(3, 32)), {}, "have the ranks 3 and 2"),
        (halves(UP) | {"base_model.model.model.image_newline": torch.ones(32)}, {}, "likely this is a LLaVA-NeXT"),
        ({"base_model.model.x.lora_embedding_A": torch.ones(1)}, {}, "no part of a plain LoRA"),
        (halves(UP) | {"base_model.model.model.strange": torch.ones(1)}, {}, "unexpected tensor .*strange"),
    ],
)
def test_adapter_that_does_not_fit(tiny, tmp_path, tensors, config, message):
    folder = write_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(LlavaError, match=message):
        load_pretrained_model(folder, tiny.folder, device="cpu")


@pytest.mark.parametrize("begin", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "something_new"])
def test_adapter_that_began_by_changing_the_base(tiny, tmp_path, begin):
    folder = write_adapter(tmp_path / "a", halves(UP), init_lora_weights=begin)
    with pytest.raises(LlavaError, match=f"init_lora_weights '{begin}' may have changed the base's own weights"):
        load_pretrained_model(folder, tiny.folder, device="cpu")


def test_every_setting_of_peft_is_known():
    """One that a later peft adds has to be looked at before its adapters load."""
    known = adapter._READ | adapter._OF_TRAINING | adapter._OTHER_KINDS.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_that_compiled_and_parallel_training_leave(tiny, tmp_path, prefix):
    expected = make_adapter(tiny, tmp_path / "a", alpha_pattern={"^model.layers.1.mlp.up_proj": 40})
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    save(
        {name.replace("base_model.model.", f"base_model.model.{prefix}"): value for name, value in tensors.items()},
        path,
    )
    assert torch.allclose(
        logits(load_pretrained_model(tmp_path / "a", tiny.folder, device="cpu").model), expected, atol=1e-5
    )


def test_more_tokens_than_the_base_has(tiny, tmp_path):
    """modules_to_save after resize_token_embeddings: peft writes both tables, the head twice."""
    model = load_pretrained_model(tiny.folder, device="cpu").model
    rows = model.config.vocab_size + 5
    model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    names = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert "base_model.model.lm_head.original_module.weight" in names
    loaded = load_pretrained_model(tmp_path / "a", tiny.folder, device="cpu").model
    assert loaded.config.vocab_size == rows
    assert torch.allclose(logits(loaded), logits(wrapped.merge_and_unload()), atol=1e-5)


def test_adapter_over_the_hugging_face_layout(tiny, tmp_path):
    export_hf(["--model-path", str(tiny.folder), "--output", str(tmp_path / "hf")])
    config = read_json(tmp_path / "hf" / "config.json")
    own = config.pop("conversation_template")  # another program's export names none
    write_json(tmp_path / "hf" / "config.json", config)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    targets = r".*(language_model.*(q_proj|up_proj)|vision_tower.*q_proj|multi_modal_projector.linear_1)"
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, alpha_pattern={"up_proj": 3}))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "a")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (tmp_path / "hf" / name).is_file():
            shutil.copy(tmp_path / "hf" / name, tmp_path / "merged")
    expected = load_pretrained_model(tmp_path / "merged", device="cpu").model.state_dict()
    over_base = load_pretrained_model(tmp_path / "a", tmp_path / "hf", device="cpu").model
    assert over_base.config.conversation_template == own
    got = over_base.state_dict()
    plain = load_pretrained_model(tmp_path / "hf", device="cpu").model.state_dict()
    assert got.keys() == expected.keys()
    changed = {name for name in got if not torch.equal(got[name], plain[name])}
    assert len(changed) > 6 and any("vision_tower" in name for name in changed)
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=1e-6), name


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
