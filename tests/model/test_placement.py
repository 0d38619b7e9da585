"""Device and dtype: what is chosen, and a map that spreads the model."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.model.weights import placement
from tests.model.checkpoints import logits
from tests.tiny import make_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("llava"), dtype=torch.float16)


def load(folder, **kwargs):
    return load_pretrained_model(folder, device="cpu", **kwargs).model


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", torch.bfloat16])
def test_named_dtype_holds_for_every_weight(folder, dtype):
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    model = load(folder, dtype=dtype)
    assert dtypes(model) == {expected}
    assert logits(model).dtype == expected
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "tables stay exact"


def test_own_dtype_by_default(folder):
    assert dtypes(load(folder)) == {torch.float16}


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_gets_float16(has, expected, monkeypatch):
    monkeypatch.setattr(placement, "_has_bf16", lambda: has)
    config = SimpleNamespace(dtype=torch.bfloat16)
    assert placement.choose_dtype(None, config, {}, torch.device("cuda")) == expected
    assert placement.choose_dtype("bfloat16", config, {}, torch.device("cuda")) == torch.bfloat16, "if it was named"
    assert placement.choose_dtype(None, config, {}, torch.device("cpu")) == torch.bfloat16


def test_unknown_dtype(folder):
    with pytest.raises(LlavaError, match="float32, float16 or bfloat16"):
        load(folder, dtype="fp16")


def test_model_is_ready_to_answer(folder):
    model = load(folder)
    assert not model.training and not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_map_of_modules(folder):
    devices = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model": "cpu", "lm_head": "cpu"}
    model = load(folder, dtype="float32", device_map=devices)
    assert torch.equal(logits(model), logits(load(folder, dtype="float32")))


def test_map_that_forgets_a_module(folder):
    with pytest.raises(LlavaError, match="device_map names no device for lm_head"):
        load(folder, device_map={"model": "cpu"})


@pytest.mark.parametrize(("device_map", "message"), [("balanced", "must be auto"), ({"": "disk"}, "doesn't fit")])
def test_map_that_can_not_be(folder, device_map, message):
    with pytest.raises(LlavaError, match=message):
        load(folder, device_map=device_map)


def test_attention_implementation(folder):
    model = load(folder, dtype="float32", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(logits(model), logits(load(folder, dtype="float32")), atol=1e-5)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_checkpoint_names_no_code_to_run(folder, tmp_path, name):
    """The library would fetch the repository of the hub that stands there, and run what is in it."""
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    config["mm_vision_config"][name] = config[name] = "kernels-community/flash-attn"
    path.write_text(json.dumps(config))
    model = load(tmp_path / "a", dtype="float32")
    assert torch.equal(logits(model), logits(load(folder, dtype="float32")))
    for part in (model, model.get_vision_tower().vision_tower):
        chosen = {one.config._attn_implementation for one in part.modules() if hasattr(one, "config")}
        assert "kernels-community/flash-attn" not in chosen


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_said_before_weights_are_read(folder, device, monkeypatch):
    monkeypatch.setattr(placement, "choose_dtype", None)
    monkeypatch.setattr("llava.model.loader.load_model", None)
    with pytest.raises(LlavaError, match=f"the device '{device}' can't be used here; leave it out"):
        load_pretrained_model(folder, device=device)
