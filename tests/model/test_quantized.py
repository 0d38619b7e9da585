"""8 and 4 bits: the language model alone is quantized, the answers stay close, a saved one loads as it was."""

import pytest
import torch

from llava.errors import LlavaError
from llava.model import load_pretrained_model, save_model
from llava.model.weights.files import WeightFiles
from llava.records import read_json
from tests.model.checkpoints import Tiny, logits, save

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

BITS = {8: {"load_8bit": True}, 4: {"load_4bit": True}}
KINDS = {8: bitsandbytes.nn.Linear8bitLt, 4: bitsandbytes.nn.Linear4bit}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"), "llama", mm_projector_type="mlp2x_gelu")


@pytest.fixture(scope="module")
def quantized(tiny, processor):
    return {bits: load_pretrained_model(tiny.folder, device="cpu", **flag) for bits, flag in BITS.items()}


@pytest.mark.parametrize("bits", BITS)
def test_which_modules_are_quantized(quantized, bits):
    model = quantized[bits].model
    for layer in model.model.layers:
        assert isinstance(layer.self_attn.q_proj, KINDS[bits])
        assert isinstance(layer.mlp.down_proj, KINDS[bits])
    kept = [model.lm_head, *model.model.mm_projector, *model.get_vision_tower().modules()]
    assert not any(isinstance(module, KINDS[bits]) for module in kept)
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (4, 0.9)])
def test_answers_stay_close(tiny, quantized, bits, least):
    exact = logits(load_pretrained_model(tiny.folder, device="cpu").model).flatten()
    found = logits(quantized[bits].model).flatten()
    assert torch.cosine_similarity(found, exact, dim=0) > least
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("bits", BITS)
def test_saved_and_loaded_again(quantized, tmp_path, bits):
    loaded = quantized[bits]
    save_model(tmp_path / "a", loaded.model, loaded.tokenizer)
    again = load_pretrained_model(tmp_path / "a", device="cpu")
    assert isinstance(again.model.model.layers[0].mlp.up_proj, KINDS[bits])
    assert torch.equal(logits(again.model), logits(loaded.model))
    other = {8: "load_4bit", 4: "load_8bit"}[bits]
    with pytest.raises(LlavaError, match=f"stored in {bits} bits, not {12 - bits}"):
        load_pretrained_model(tmp_path / "a", device="cpu", **{other: True})


def test_eight_bit_projector_of_an_older_release(tiny, quantized, tmp_path):
    """Older code quantized the projector too; what is quantized is read off the file."""
    save_model(tmp_path / "a", quantized[8].model, quantized[8].tokenizer)
    weights = WeightFiles.of_folder(tmp_path / "a")
    tensors = {name: weights.read(name).clone() for name in weights}
    name = "model.mm_projector.0"
    scale = tensors[f"{name}.weight"].abs().amax(dim=1)
    tensors[f"{name}.weight"] = (tensors[f"{name}.weight"] / scale[:, None] * 127).round().to(torch.int8)
    tensors[f"{name}.SCB"] = scale
    save(tensors, tmp_path / "a" / "model.safetensors")
    again = load_pretrained_model(tmp_path / "a", device="cpu")
    assert type(again.model.model.mm_projector[0]) is KINDS[8]
    assert torch.cosine_similarity(logits(again.model).flatten(), logits(quantized[8].model).flatten(), dim=0) > 0.99


def test_missing_statistics_are_named(quantized, tmp_path):
    save_model(tmp_path / "a", quantized[4].model, quantized[4].tokenizer)
    weights = WeightFiles.of_folder(tmp_path / "a")
    gone = "model.layers.0.mlp.up_proj.weight.absmax"
    save({name: weights.read(name).clone() for name in weights if name != gone}, tmp_path / "a" / "model.safetensors")
    with pytest.raises(LlavaError, match=r"model\.layers\.0\.mlp\.up_proj\.weight.*absmax"):
        load_pretrained_model(tmp_path / "a", device="cpu")


@pytest.mark.parametrize(("quant_type", "double_quant"), [("fp4", False), ("fp4", None), (None, False)])
def test_other_kinds_of_four_bits(tiny, processor, tmp_path, quant_type, double_quant):
    how = {"quant_type": quant_type, "double_quant": double_quant}
    loaded = load_pretrained_model(tiny.folder, device="cpu", load_4bit=True, **how)
    state = loaded.model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == (quant_type or "nf4", double_quant is None)
    exact = logits(load_pretrained_model(tiny.folder, device="cpu").model).flatten()
    assert torch.cosine_similarity(logits(loaded.model).flatten(), exact, dim=0) > 0.8
    save_model(tmp_path / "a", loaded.model, loaded.tokenizer)
    again = load_pretrained_model(tmp_path / "a", device="cpu")
    state = again.model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == (quant_type or "nf4", double_quant is None)
    assert torch.equal(logits(again.model), logits(loaded.model))
    # What is written again says so too.
    save_model(tmp_path / "b", again.model, again.tokenizer)
    assert torch.equal(logits(load_pretrained_model(tmp_path / "b", device="cpu").model), logits(loaded.model))
    written = read_json(tmp_path / "b" / "config.json")["quantization_config"]
    assert written["bnb_4bit_quant_type"] == (quant_type or "nf4")
    assert written["bnb_4bit_use_double_quant"] is (double_quant is None)
    load_pretrained_model(tmp_path / "a", device="cpu", load_4bit=True, **how)
    with pytest.raises(LlavaError, match=r"weights are stored as .* double quantization"):
        other = {"quant_type": "nf4" if quant_type else "fp4"}
        load_pretrained_model(tmp_path / "a", device="cpu", load_4bit=True, **other)


def test_both_flags_exclude_each_other(tiny):
    with pytest.raises(LlavaError, match="exclude each other"):
        load_pretrained_model(tiny.folder, load_8bit=True, load_4bit=True)
