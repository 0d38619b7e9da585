import json
from dataclasses import replace

import pytest

from llava.errors import LlavaError
from llava.train.estimate_memory import KNOWN_SHAPES, Recipe, estimate, lora_parameters, main, parameters, remedies

SEVEN = KNOWN_SHAPES["llama-7b"]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_parameters_are_counted_as_the_model_has_them(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    from tests.tiny import make_llm

    folder = make_llm(tmp_path / "llm", kind)
    shape = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


def test_adapters_are_counted_as_peft_makes_them(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.tiny import make_llm

    folder = make_llm(tmp_path / "llm", "mistral")
    shape = json.loads((folder / "config.json").read_text())
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=names))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert lora_parameters(shape, 4) == trained


def test_full_fine_tuning_of_7b_needs_what_arithmetic_says():
    parts = estimate(Recipe(SEVEN, per_device_train_batch_size=1, gradient_checkpointing=True))
    assert parts["optimizer"] + parts["weights"] == pytest.approx(81, rel=0.05)  # 12 bytes × 6.74e9
    whole = estimate(Recipe(SEVEN, per_device_train_batch_size=2))
    assert whole["activations"] == pytest.approx(18, rel=0.05)  # 4096 positions


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 1},
        {"lora_enable": True},
        {"lora_enable": True, "bits": 4},
        {"tune_mm_mlp_adapter": True},
        {"optim": "adamw_bnb_8bit"},
        {"gpus": 8, "shard": 3},
        {"gpus": 8, "shard": 2},
        {"offload": True},
    ],
)
def test_every_saving_saves(change):
    recipe = Recipe(SEVEN)
    assert estimate(replace(recipe, **change))["total"] < estimate(recipe)["total"]


def test_partial_checkpointing_lies_between_none_and_all(capsys):
    half = Recipe(SEVEN, gradient_checkpointing=True, every_n_layers=2)
    everything = replace(half, every_n_layers=1)
    nothing = replace(half, gradient_checkpointing=False)
    sizes = [estimate(recipe)["activations"] for recipe in (everything, half, nothing)]
    assert sizes == sorted(sizes) and sizes[1] == pytest.approx((sizes[0] + sizes[2]) / 2, rel=0.1)
    argv = ["--model_name_or_path", "llama-7b", "--gradient_checkpointing", "--gradient_checkpointing_kwargs"]
    main([*argv, '{"every_n_layers": 2}', "--gpu-memory-gb", "500"])
    assert "activations" in capsys.readouterr().out
    for wrong in ("{", "[]", '{"every_n_layers": 0}', '{"every_n_layers": "x"}'):
        with pytest.raises(LlavaError, match="gradient_checkpointing_kwargs"):
            main([*argv, wrong])


def test_remedies_end_with_a_recipe_that_fits():
    changes = remedies(Recipe(SEVEN), 24)
    assert changes and estimate(changes[-1][1])["total"] <= 24
    assert remedies(Recipe(SEVEN), 1) == []


def test_the_command_answers_and_says_what_would_help(capsys, tmp_path):
    report = tmp_path / "parts.json"
    argv = ["--model_name_or_path", "llama-7b", "--bf16", "True", "--gpu-memory-gb", "24", "--learning_rate", "2e-5"]
    assert main([*argv, "--json", str(report)]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "--lora_enable True" in out
    assert json.loads(report.read_text())["total_gb"] > 24
    assert main([*argv, "--lora_enable", "--bits", "4", "--gradient_checkpointing"]) == 0
    assert "fits" in capsys.readouterr().out


def test_unknown_flags_and_models_are_refused():
    with pytest.raises(LlavaError, match="nosuch"):
        main(["--model_name_or_path", "llama-7b", "--nosuch", "1"])
    with pytest.raises(LlavaError, match=r"config\.json"):
        main(["--model_name_or_path", "nowhere"])


def test_sharded_over_gpus_each_holds_less(capsys, tmp_path):
    argv = ["--model_name_or_path", "llama-7b", "--bf16", "True", "--fsdp", "full_shard", "--gradient_checkpointing"]
    totals = []
    for gpus in ("1", "8"):
        main([*argv, "--gpus", gpus, "--json", str(tmp_path / gpus)])
        totals.append(json.loads((tmp_path / gpus).read_text())["total_gb"])
    assert totals[1] < totals[0] / 3
