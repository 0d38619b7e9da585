"""A new LLaVA from a language model and a tower: settings, image tokens, embeddings, errors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, add_image_tokens, build_model_from_llm
from tests.tiny import make_clip, make_llm


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module", params=["llama", "mistral"])
def llm(request, tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp(request.param), request.param)


def test_weights_and_config_are_those_of_the_language_model(llm, clip):
    loaded = build_model_from_llm(llm, clip, device="cpu", mm_projector_type="mlp2x_gelu", image_aspect_ratio="pad")
    source = json.loads((llm / "config.json").read_text())
    expected = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM}[source["model_type"]]
    assert type(loaded.model) is expected
    weights = loaded.model.state_dict()
    for name, tensor in load_file(llm / "model.safetensors").items():
        assert torch.equal(weights[name], tensor), name
    config = loaded.model.config
    assert config.hidden_size == source["hidden_size"] and config.num_key_value_heads == source["num_key_value_heads"]
    assert (config.image_aspect_ratio, config.mm_hidden_size, config.mm_projector_type) == ("pad", 24, "mlp2x_gelu")
    assert config.mm_vision_tower == str(clip)
    assert loaded.image_processor.crop_size == (28, 28)
    assert loaded.context_len == source["max_position_embeddings"]


def test_projector_has_torchs_initialisation_and_follows_the_seed(llm, clip):
    def projector(seed):
        torch.manual_seed(seed)
        return build_model_from_llm(llm, clip, device="cpu").model.model.mm_projector

    first, again, other = projector(1), projector(1), projector(2)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    bound = 24**-0.5
    assert first.weight.abs().max() <= bound and first.bias.abs().max() <= bound and first.bias.any()


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, []),
        ({"mm_use_im_patch_token": True}, ["<im_patch>"]),
        ({"mm_use_im_start_end": True}, ["<im_start>", "<im_end>"]),
        ({"mm_image_token_scheme": "patch", "mm_use_im_start_end": True}, ["<im_patch>", "<im_start>", "<im_end>"]),
    ],
)
def test_image_tokens_get_mean_rows(llm, clip, fields, tokens):
    loaded = build_model_from_llm(llm, clip, device="cpu", **fields)
    old = load_file(llm / "model.safetensors")
    count = old["model.embed_tokens.weight"].shape[0]
    assert loaded.tokenizer.convert_tokens_to_ids(tokens) == list(range(count, count + len(tokens)))
    assert loaded.model.config.vocab_size == len(loaded.tokenizer) == count + len(tokens)
    for name, embedding in (
        ("model.embed_tokens.weight", loaded.model.get_input_embeddings()),
        ("lm_head.weight", loaded.model.get_output_embeddings()),
    ):
        assert torch.equal(embedding.weight[:count], old[name])
        for row in embedding.weight[count:]:
            assert torch.allclose(row, old[name].mean(dim=0), atol=1e-6)
    assert add_image_tokens(loaded.model, loaded.tokenizer) == 0, "a second time adds nothing"


def test_v10_tokens_swallow_blanks_as_in_its_training(llm, clip):
    tokenizer = build_model_from_llm(llm, clip, device="cpu", mm_image_token_scheme="patch").tokenizer
    assert tokenizer("a <im_patch>\n b").input_ids == tokenizer("a<im_patch>b").input_ids
    other = build_model_from_llm(llm, clip, device="cpu", mm_use_im_patch_token=True).tokenizer
    assert other("a <im_patch>\n b").input_ids != other("a<im_patch>b").input_ids


def test_unknown_field(llm, clip):
    with pytest.raises(LlavaError, match="no field mm_projector_kind"):
        build_model_from_llm(llm, clip, device="cpu", mm_projector_kind="linear")


def test_other_kind_of_language_model(llm, clip, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(LlavaError, match="type 'gpt2' aren't supported; use llama, mistral or qwen2"):
        build_model_from_llm(tmp_path, clip, device="cpu")


def test_missing_folder(llm, tmp_path):
    with pytest.raises(LlavaError, match="vision tower not found: no folder"):
        build_model_from_llm(llm, tmp_path / "none", device="cpu")


def test_language_model_with_a_missing_tensor(llm, clip, tmp_path):
    for path in llm.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LlavaError, match=r"missing tensor model\.norm\.weight; looked in .*model\.safetensors"):
        build_model_from_llm(tmp_path, clip, device="cpu")


def test_tied_embeddings(clip, tmp_path):
    llm = make_llm(tmp_path / "tied", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(llm / "model.safetensors")
    model = build_model_from_llm(llm, clip, device="cpu", mm_use_im_start_end=True).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("llm", {"hidden_size": "wide"}),
        ("llm", {"num_attention_heads": 0}),
        ("clip", {"hidden_size": "wide"}),
        ("clip", {"num_attention_heads": 5}),
        ("clip", {"model_type": "clip"}),
        ("clip", {"model_type": ["clip"]}),
        ("clip", None),
    ],
)
def test_settings_that_no_model_can_have_are_said_in_one_line(tmp_path, part, fields):
    folders = {"llm": make_llm(tmp_path / "llm"), "clip": make_clip(tmp_path / "clip")}
    path = folders[part] / "config.json"
    path.write_text(json.dumps([] if fields is None else json.loads(path.read_text()) | fields))
    with pytest.raises(LlavaError, match=f"{part}: config.json ") as caught:
        build_model_from_llm(folders["llm"], folders["clip"], device="cpu")
    assert "\n" not in str(caught.value)
