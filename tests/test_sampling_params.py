"""A sampling parameter is declared once: commands, page and manifests have it by that alone."""

import json

import pytest

from llava.commandline import ArgumentParser
from llava.errors import LlavaError
from llava.eval import model_vqa, model_vqa_med, run_llava, run_med_datasets_eval_batch
from llava.eval.answers.manifest import decoding_entry, describe
from llava.sampling_params import FLAG, SamplingParams, add_sampling_flags, sampling_from_args, sliders
from llava.serve import cli

FLAGS = [name for name, field in SamplingParams.model_fields.items() if FLAG in field.metadata]


def read(*words, **defaults):
    parser = ArgumentParser()
    add_sampling_flags(parser, **defaults)
    return sampling_from_args(parser.parse_args(words))


@pytest.mark.parametrize("command", [cli, run_llava, model_vqa, model_vqa_med, run_med_datasets_eval_batch])
def test_every_command_that_answers_has_every_flag(command):
    needed = {"--model-path": "m", "--question-file": "q", "--query": "Q?"}
    known = command.build_parser()._option_string_actions
    words = [word for flag, value in needed.items() if flag in known for word in (flag, value)]
    for name in FLAGS:
        args = command.build_parser().parse_args([*words, f"--{name.replace('_', '-')}", "1"])
        assert getattr(args, name) == 1, "dashes are as good as underscores"


def test_the_commands_own_defaults():
    assert sampling_from_args(cli.build_parser().parse_args(["--model-path", "m"])) == SamplingParams(
        temperature=0.2, max_new_tokens=512
    )
    assert read() == SamplingParams() and read(seed=3) == SamplingParams(seed=3)


def test_a_wrong_value_names_its_flag():
    for words in (["--top_p", "1.5"], ["--temperature", "nan"], ["--num_beams", "2", "--temperature", "1"]):
        with pytest.raises(LlavaError, match=f"^{words[0]}"):
            read(*words)


OLD = {
    (): {"temperature": 0.0, "top_p": None, "num_beams": 1, "max_new_tokens": 1024, "seed": 0},
    ("--top_p", "1.0"): {"temperature": 0.0, "top_p": 1.0, "num_beams": 1, "max_new_tokens": 1024, "seed": 0},
    ("--temperature", "0.7", "--seed", "3"): {
        "temperature": 0.7,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 1024,
        "seed": 3,
    },
    ("--num_beams", "3", "--max_new_tokens", "8"): {
        "temperature": 0.0,
        "top_p": None,
        "num_beams": 3,
        "max_new_tokens": 8,
        "seed": 0,
    },
}


@pytest.mark.parametrize("words", OLD)
def test_manifests_of_earlier_versions_go_on(words):
    """Letter by letter: the fingerprint of a run, which says whether it may go on, is made of this text."""
    entry = decoding_entry(_of_evaluation(*words))
    assert json.dumps(entry, sort_keys=True) == json.dumps(OLD[words], sort_keys=True)


def test_a_manifest_names_what_is_not_at_its_default():
    entry = decoding_entry(_of_evaluation("--top-k", "5", "--repetition-penalty", "1.2"))
    assert entry == OLD[()] | {"top_k": 5, "repetition_penalty": 1.2}
    assert "top_k 5 repetition_penalty 1.2" in describe({"decoding": entry})
    assert decoding_entry(_of_evaluation("--top-k", "-1")) == OLD[()]


def test_the_page_has_a_control_for_each_slider():
    gr = pytest.importorskip("gradio")
    from llava.serve.web.parts.settings import SettingsPanel

    with gr.Blocks():
        panel = SettingsPanel()
    assert panel.names == list(sliders()) and {"temperature", "top_k", "max_new_tokens"} <= set(panel.names)
    values = [control.value for control in panel.controls]
    assert panel.read(values) == SamplingParams(max_new_tokens=256)
    values[panel.names.index("top_k")] = 7.0
    assert panel.read(values).top_k == 7
    for control, (name, (_, slider)) in zip(panel.controls, sliders().items(), strict=True):
        for end in (slider.low, slider.high):
            assert getattr(SamplingParams(**{name: end}), name) == end, "a control never leads to an error"
        assert slider.low <= control.value <= slider.high


def _of_evaluation(*words):
    return sampling_from_args(model_vqa.build_parser().parse_args(["--question-file", "q", *words]))
