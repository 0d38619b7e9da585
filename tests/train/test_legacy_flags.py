import json

import pytest

from llava.errors import LlavaError
from llava.train.legacy_flags import translate_flags

BOOLEANS = {"bf16", "tf32", "use_cpu", "mm_use_im_start_end", "lazy_preprocess", "activation_checkpointing"}


def translate(text: str, *, has_gpu=True, keep_fsdp=False):
    import shlex

    argv, warnings = translate_flags(shlex.split(text), BOOLEANS, has_gpu=has_gpu, keep_fsdp=keep_fsdp)
    flags, name = {}, None
    for arg in argv:
        if arg.startswith("--"):
            name = arg[2:]
            flags[name] = []
        else:
            flags[name].append(arg)
    return flags, warnings


def test_dashes_are_underscores_and_values_may_be_joined_by_equals():
    flags, warnings = translate("--output-dir=a-b --data_path c-d.json --mm-vision-select-layer -2")
    assert flags == {"output_dir": ["a-b"], "data_path": ["c-d.json"], "mm_vision_select_layer": ["-2"]}
    assert warnings == []


def test_a_boolean_that_stands_alone_is_true():
    flags, _ = translate("--mm_use_im_start_end --bf16 False --lazy-preprocess")
    assert flags == {"mm_use_im_start_end": ["True"], "bf16": ["False"], "lazy_preprocess": ["True"]}


@pytest.mark.parametrize(
    "old, new",
    [
        ("--evaluation_strategy no", {"eval_strategy": ["no"]}),
        ("--warmup_ratio 0.03", {"warmup_steps": ["0.03"]}),
        ("--group_by_length True", {"train_sampling_strategy": ["group_by_length"]}),
        ("--group_by_length False", {}),
        ("--no_cuda True", {"use_cpu": ["True"]}),
        ("--adafactor", {"optim": ["adafactor"]}),
        ("--logging_dir logs", {}),
        ("--save_safetensors True", {}),
        ("--force_fsdp False", {}),
        ("--trust_remote_code True", {}),
    ],
)
def test_dropped_names_are_translated_with_one_warning(old, new):
    flags, warnings = translate(old)
    assert flags == new
    assert len(warnings) == 1 and old.split()[0] in warnings[0]


def test_gradient_checkpointing_keeps_working_under_its_new_name():
    flags, _ = translate("--gradient_checkpointing True")
    assert flags == {"activation_checkpointing": ["True"]}


@pytest.mark.parametrize("value", ["1.5", "-0.1", "much"])
def test_a_warmup_ratio_that_cannot_be_is_refused(value):
    with pytest.raises(LlavaError, match="warmup_ratio"):
        translate(f"--warmup_ratio {value}")


@pytest.mark.parametrize("value", ["", "many", "-1", "1e8"])
def test_a_number_of_parameters_that_cannot_be_is_refused(value):
    with pytest.raises(LlavaError, match=f"--fsdp_min_num_params {value}: expected a whole number"):
        translate(f"--fsdp full_shard --fsdp_min_num_params {value}")


@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize("words", ["foo", "hybrid_shard auto_wrap", "full_shard,auto_wrap"])
def test_kinds_of_sharding_that_fsdp_2_does_not_have_are_refused(words, has_gpu):
    with pytest.raises(LlavaError, match=f'--fsdp "{words}": expected True, or words of: auto_wrap, full_shard'):
        translate(f"--fsdp '{words}'", has_gpu=has_gpu)


def test_warmup_steps_win_over_a_ratio_and_it_is_said():
    flags, warnings = translate("--warmup_ratio 0.03 --warmup_steps 10")
    assert flags == {"warmup_steps": ["10"]} and "ignored" in warnings[0]


def test_published_fsdp_flags_become_fsdp_2_on_gpus():
    flags, warnings = translate("--fsdp 'full_shard auto_wrap' --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer")
    assert flags["fsdp"] == ["True"]
    assert json.loads(flags["fsdp_config"][0]) == {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    assert len(warnings) == 2


def test_fsdp_config_may_be_a_file_and_is_merged(tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text('{"fsdp_version": 1}')
    flags, _ = translate(f"--fsdp 'full_shard offload' --fsdp_config {path}")
    assert json.loads(flags["fsdp_config"][0]) == {"version": 1, "cpu_offload": True}


def test_without_a_gpu_everything_runs_and_each_change_is_said():
    flags, warnings = translate("--bf16 True --tf32 True --fsdp 'full_shard auto_wrap' --fp16", has_gpu=False)
    assert flags == {"bf16": ["True"], "use_cpu": ["True"]}
    assert len(warnings) == 4
    assert all(any(name in warning for warning in warnings) for name in ("bf16", "tf32", "fsdp", "fp16"))


def test_flags_that_change_nothing_without_a_gpu_are_silent():
    flags, warnings = translate("--tf32 False --bf16 False --fsdp ''", has_gpu=False)
    assert flags == {"bf16": ["False"], "use_cpu": ["True"]}
    assert [w for w in warnings if "fsdp" not in w] == []


def test_what_was_asked_for_is_no_surprise():
    flags, warnings = translate("--use_cpu True --bf16 True", has_gpu=False)
    assert flags == {"bf16": ["True"], "use_cpu": ["True"]} and warnings == []
