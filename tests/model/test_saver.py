"""Saved checkpoints: whole or not at all, readable by older programs, the same model when loaded again."""

import json
import shutil

import pytest
import torch

from llava.errors import LlavaError
from llava.model import load_pretrained_model, save_model
from llava.model.weights.files import WeightFiles
from tests.model.checkpoints import logits
from tests.tiny import make_llava


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_pretrained_model(make_llava(tmp_path_factory.mktemp("llava"), "mistral"), device="cpu")


def save(loaded, folder, **kwargs):
    save_model(folder, loaded.model, loaded.tokenizer, loaded.image_processor, **kwargs)
    return folder


def test_round_trip(loaded, tmp_path):
    again = load_pretrained_model(save(loaded, tmp_path / "a"), device="cpu")
    assert torch.equal(logits(again.model), logits(loaded.model))
    text = "What does <im_start> the image  show?\n"
    assert again.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
    assert again.image_processor == loaded.image_processor
    ours, theirs = again.model.config.to_dict(), loaded.model.config.to_dict()
    assert {name for name in ours if ours[name] != theirs.get(name)} <= {"architectures", "transformers_version"}


def test_needs_nothing_but_its_folder(tmp_path):
    folder = make_llava(tmp_path / "made")
    shutil.move(folder, tmp_path / "moved")
    shutil.rmtree(tmp_path / "made")
    load_pretrained_model(tmp_path / "moved", device="cpu")


def test_config_has_the_names_that_older_programs_read(loaded, tmp_path):
    config = json.loads((save(loaded, tmp_path / "a") / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == "float32"
    assert config["architectures"] == ["LlavaMistralForCausalLM"] and config["model_type"] == "llava_mistral"
    tokenizer = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend"} & set(tokenizer)


def test_scaled_rope_keeps_its_older_form(loaded, tmp_path):
    config = type(loaded.model.config).from_dict(
        loaded.model.config.to_dict() | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 2.0}
    assert written["rope_theta"] == 5e5
    again = type(config).from_pretrained(tmp_path)
    assert {name: again.rope_parameters[name] for name in config.rope_parameters} == config.rope_parameters


def test_shards_of_an_earlier_save_are_removed(loaded, tmp_path):
    folder = save(loaded, tmp_path / "a", max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "trainer_state.json").write_text("{}")
    save(loaded, folder)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert (folder / "trainer_state.json").exists(), "other files stay"
    assert torch.equal(logits(load_pretrained_model(folder, device="cpu").model), logits(loaded.model))


def test_failed_save_leaves_the_earlier_one(loaded, tmp_path):
    folder = save(loaded, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    with pytest.raises(LlavaError, match="no space"):
        save_model(folder, loaded.model, loaded.tokenizer, Broken())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_given_state_is_what_is_saved(loaded, tmp_path):
    state = {name: tensor + 1 for name, tensor in loaded.model.state_dict().items()}
    folder = save(loaded, tmp_path / "a", state_dict=state)
    saved = WeightFiles.of_folder(folder)
    assert torch.equal(saved.read("model.norm.weight"), loaded.model.model.norm.weight + 1)
