"""LoRA and QLoRA: what is trained, what is written, and that it loads again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava.errors import LlavaError
from llava.model import load_pretrained_model, quantize
from llava.train.train import train
from tests.tiny import make_llava
from tests.train.helpers import flags, make_records


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("base"), conversation_template="llava_llama_2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data"))


LORA = ("--lora_enable", "--lora_r", "4", "--max_steps", "3", "--learning_rate", "1e-2")


def test_adapters_and_projector_are_trained_written_and_loaded(tmp_path, base, data):
    out = tmp_path / "lora"
    summary = train(flags(out, data, base, *LORA))
    adapter = load_file(out / "adapter_model.safetensors")
    assert adapter and all("lora_" in name and ".layers." in name and "vision" not in name for name in adapter)
    beside = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert {name.rpartition("mm_projector")[2] for name in beside} == {".weight", ".bias"}
    trained = sum(t.numel() for t in adapter.values()) + sum(t.numel() for t in beside.values())
    assert summary["trainable_parameters"] == trained
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    before = load_pretrained_model(base, device="cpu").model.state_dict()
    after = load_pretrained_model(out, base, device="cpu").model.state_dict()
    names = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in names) and any("mm_projector" in name for name in names)
    assert not any("vision_tower" in name or "embed" in name or "lm_head" in name for name in names)
    alone = load_pretrained_model(out, device="cpu").model.state_dict()  # over the base that it records
    assert all(torch.equal(alone[name], after[name]) for name in after)
    card = (out / "README.md").read_text()
    assert "LoRA adapter of a LLaVA (rank 4, scale 4)" in card and "research only" in card.lower()
    assert f"\n# {out.name}\n" in card and "More Information Needed" not in card and f"| Base | {base.name} |" in card
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.glob("*.safetensors"))
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/away"}))
    with pytest.raises(LlavaError, match="is a LoRA adapter, not a whole model; add --model-base gone/away"):
        load_pretrained_model(out, device="cpu")


def test_the_merged_model_computes_what_the_adapter_did(tmp_path, base, data):
    """The training's own forward pass with adapters against the loaded, merged model."""
    from llava.train import setup_run
    from llava.train.arguments import parse_arguments
    from llava.train.data.record_store import open_records
    from llava.train.prepare_model import prepare_model

    arguments = parse_arguments(flags(tmp_path / "lora", data, base, *LORA))
    loaded = prepare_model(arguments)
    dataset, cache = setup_run.build_dataset(arguments, loaded, open_records(data))
    trainer = setup_run.build_trainer(arguments, loaded, dataset, cache)
    trainer.train()
    setup_run.save_final(trainer)
    batch = trainer.data_collator([dataset[0], dataset[1]])
    batch = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
    with torch.no_grad():
        wanted = trainer.model.eval()(**batch).logits
        merged = load_pretrained_model(tmp_path / "lora", base, device="cpu").model
        torch.testing.assert_close(merged(**batch).logits, wanted, atol=1e-4, rtol=1e-4)


def test_target_modules_can_be_chosen(tmp_path, base, data):
    train(flags(tmp_path / "out", data, base, *LORA, "--lora_target_modules", "q_proj,v_proj"))
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}
    with pytest.raises(LlavaError, match="no linear layer wheel"):
        train(flags(tmp_path / "bad", data, base, *LORA, "--lora_target_modules", "wheel"))


def test_an_adapter_is_continued(tmp_path, base, data):
    train(flags(tmp_path / "one", data, base, *LORA))
    more = ("--lora_weight_path", str(tmp_path / "one"), "--learning_rate", "0")
    train(flags(tmp_path / "two", data, base, *LORA, *more))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    beside = [torch.load(tmp_path / name / "non_lora_trainables.bin", weights_only=True) for name in ("one", "two")]
    assert all(torch.equal(beside[0][name], beside[1][name]) for name in beside[0])


def test_the_folder_of_an_adapter_may_begin_with_the_home(tmp_path, base, data, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(flags(tmp_path / "one", data, base, *LORA, "--max_steps", "1"))
    more = ("--lora_enable", "--max_steps", "1", "--learning_rate", "0", "--lora_weight_path", "~/one")
    train(flags(tmp_path / "two", data, base, *more))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one and all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_continued_is_refused(tmp_path, base, data):
    train(flags(tmp_path / "one", data, base, *LORA, "--max_steps", "1"))
    (tmp_path / "empty").mkdir()
    for place, more, message in (
        ("empty", (), "no adapter_config.json, so this is no LoRA folder"),
        ("one", ("--lora_r", "8"), "--lora_r 8: .* was made with 4; leave the flag out"),
        ("one", ("--lora_alpha", "32"), "--lora_alpha 32: .* leave the flag out"),
        ("one", ("--lora_target_modules", "q_proj"), "--lora_target_modules: .* leave the flag out"),
    ):
        words = flags(tmp_path / "two", data, base, "--lora_enable", "--lora_weight_path", str(tmp_path / place), *more)
        with pytest.raises(LlavaError, match=message):
            train(words)


def test_resuming_restores_adapter_and_projector(tmp_path, base, data):
    import shutil

    more = (*LORA, "--save_strategy", "steps", "--save_steps", "2", "--lora_dropout", "0")
    train(flags(tmp_path / "whole", data, base, *more))
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    train(flags(tmp_path / "killed", data, base, *more))
    for name in ("adapter_model.safetensors",):
        whole, killed = load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)
        assert all(torch.equal(whole[key], killed[key]) for key in whole)
    whole, killed = (
        torch.load(tmp_path / name / "non_lora_trainables.bin", weights_only=True) for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quantized_base_trains_adapters(processor, tmp_path, base, data, bits):
    summary = train(flags(tmp_path / "out", data, base, *LORA, "--bits", bits, "--gradient_checkpointing", "True"))
    assert summary["last_loss"] < summary["first_loss"] + 1
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    load_pretrained_model(tmp_path / "out", base, device="cpu")


@pytest.mark.parametrize("more", [["--quant_type", "fp4"], ["--double_quant", "False"]])
def test_qlora_trains_over_every_kind_of_four_bits(processor, tmp_path, base, data, more):
    usual = train(flags(tmp_path / "usual", data, base, *LORA, "--bits", "4", "--max_steps", "1"))
    other = train(flags(tmp_path / "out", data, base, *LORA, "--bits", "4", "--max_steps", "1", *more))
    assert other["first_loss"] != usual["first_loss"], "the base has other weights"
    assert other["first_loss"] == pytest.approx(usual["first_loss"], rel=0.2)
    load_pretrained_model(tmp_path / "out", base, device="cpu", load_4bit=True)


def test_a_base_that_is_stored_in_four_bits_trains_adapters(tmp_path, base, data):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    stored = tmp_path / "stored"
    words = ["--model-path", str(base), "--output", str(stored), "--bits", "4", "--device", "cpu"]
    quantize.main([*words, "--quant-type", "fp4", "--double-quant", "False"])
    state = load_pretrained_model(stored, device="cpu").model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("fp4", False)
    more = [*LORA, "--max_steps", "1", "--bits", "4"]
    summary = train(flags(tmp_path / "out", data, stored, *more))
    kind = ["--quant_type", "fp4", "--double_quant", "False"]
    same = train(flags(tmp_path / "same", data, stored, *more, *kind))
    assert summary["first_loss"] == same["first_loss"]
    with pytest.raises(LlavaError, match="stored as fp4 without double quantization"):
        train(flags(tmp_path / "wrong", data, stored, *more, "--quant_type", "nf4"))
