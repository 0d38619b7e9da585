"""Whole models of the library: how they compute isn't their config.json's to say."""

import pytest
from transformers import AutoModel, AutoModelForCausalLM, CLIPConfig, CLIPModel

from llava.errors import LlavaError
from llava.model.library_model import load_library_model
from llava.records import read_json, write_json
from tests.tiny import make_clip, make_llm

KERNEL = "nobody/no-such-kernel"


def make_whole_clip(folder):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "vocab_size": 10, "eos_token_id": 9, "bos_token_id": 8, "pad_token_id": 7}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("auto_class", "make"), [(AutoModelForCausalLM, make_llm), (AutoModel, make_clip), (AutoModel, make_whole_clip)]
)
def test_a_kernel_that_the_folder_names_is_not_used(tmp_path, auto_class, make):
    folder = make(tmp_path / "model")
    fields = read_json(folder / "config.json")
    nested = {name: {**part, "attn_implementation": KERNEL} for name, part in fields.items() if isinstance(part, dict)}
    write_json(folder / "config.json", {**fields, **nested, "attn_implementation": KERNEL})
    model = load_library_model(auto_class, folder, "model")
    assert model.config._attn_implementation == "sdpa" and not model.training
    if make is make_llm:  # of vision models the library's older versions don't read the field
        with pytest.raises(Exception, match=r"no-such-kernel|kernels"):
            auto_class.from_pretrained(folder)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(LlavaError, match="no language model of the library"):
        load_library_model(AutoModelForCausalLM, tmp_path, "language model")
