"""Folders and hub ids: where a name is looked for, and what is downloaded."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.model.convert.hub_upload import upload_folder
from llava.model.weights import locate
from llava.model.weights.files import WeightFiles
from llava.model.weights.locate import find_model, locate_model
from llava.records import read_json, write_json
from tests.documented_commands import ROOT
from tests.model.checkpoints import save
from tests.tiny import hub_cache, make_llava


def test_folder_as_given(tmp_path):
    assert locate_model(tmp_path) == tmp_path
    assert locate_model(str(tmp_path)) == tmp_path


def test_relative_folder_beside_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "models" / "llava"
    for folder in (checkpoint / "inside", tmp_path / "models" / "beside", tmp_path / "here"):
        folder.mkdir(parents=True)
    assert locate_model("here", relative_to=checkpoint) == Path("here")
    assert locate_model("inside", relative_to=checkpoint) == checkpoint / "inside"
    assert locate_model("beside", relative_to=checkpoint) == tmp_path / "models" / "beside"


@pytest.mark.parametrize("name", ["config.json", "additional_chat_templates/tool_use.jinja", "LICENSE", "merges.txt"])
def test_a_link_to_a_file_elsewhere(tmp_path, name):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    (folder / name).parent.mkdir(parents=True)
    outside.touch()
    (folder / name).symlink_to(outside)
    for locate_it in (locate_model, partial(find_model, relative_to=tmp_path)):
        with pytest.raises(LlavaError, match=f"{name}: a link to {outside}, outside the model's folder; put a copy"):
            locate_it(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "additional_chat_templates/tool_use.jinja"])
def test_a_file_that_is_too_large(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for other in (name, "trainer_state.json", "log.txt", "model.safetensors"):
        (tmp_path / other).touch()
        os.truncate(tmp_path / other, 200_000_000)
    with pytest.raises(LlavaError, match=f"{name}: 200,000,000 bytes; at most 134,217,728 of a model's settings"):
        locate_model(tmp_path)
    (tmp_path / name).unlink()
    assert locate_model(tmp_path) == tmp_path


def test_a_folder_of_templates_that_is_a_link(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "private.jinja").touch()
    (folder / "additional_chat_templates").symlink_to(outside)
    with pytest.raises(LlavaError, match=r"a link to .*private\.jinja, outside the model's folder"):
        locate_model(folder)


def test_links_that_name_nothing_of_others(tmp_path):
    """To weights, to the folder's own files, and from a snapshot, or a folder downloaded to, to the hub's cache."""
    cache = tmp_path / "models--some--model"
    blobs, folder, chosen = cache / "blobs", cache / "snapshots" / ("0" * 40), tmp_path / "chosen"
    for place in (blobs, folder, chosen):
        place.mkdir(parents=True)
    for path in (blobs / "abc", folder / "LICENSE.txt", tmp_path / "weights"):
        path.touch()
    (folder / "config.json").symlink_to("../../blobs/abc")
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    (chosen / "config.json").symlink_to(blobs / "abc")
    assert locate_model(folder) == folder and locate_model(chosen) == chosen
    (tmp_path / "by-its-name").symlink_to(folder)
    assert locate_model(tmp_path / "by-its-name") == tmp_path / "by-its-name"


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "a/b/c", "~/none here", "../up"])
def test_path_that_is_not_there(name):
    with pytest.raises(LlavaError, match="vision tower not found: no folder"):
        locate_model(name, "vision tower")


def test_file_in_place_of_a_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(LlavaError, match="expected a folder or a hub id, this is a file"):
        locate_model(path)


def test_a_hub_that_has_no_such_model(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(locate, "_answers", lambda address: True)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", _unknown)
    with pytest.raises(
        LlavaError,
        match=r"not found: there is no folder some/model; if it is a hub id: .* \(no such repository\)\); fill",
    ):
        locate_model("some/model")


def _unknown(*_, **__):
    raise huggingface_hub.errors.OfflineModeIsEnabled("no such repository")


class Silent:
    """A server that takes connections and never answers."""

    def __enter__(self) -> str:
        self.socket = socket.create_server(("127.0.0.1", 0))
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *_) -> None:
        self.socket.close()


def asked(cache, **environment) -> subprocess.CompletedProcess:
    """What a process of its own says that looks for some/model; the hub's own retries would take 28 s."""
    code = "from llava.commandline import run; from llava.model.weights.locate import locate_model\n"
    code += "run(lambda: print(locate_model('some/model')))"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(cache)} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=15)


@pytest.mark.parametrize("how", ["refused", "silent", "no such name", "offline"])
def test_without_a_network_the_cache_is_used_at_once(how, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    cache = hub_cache(tmp_path / "cache", {"some/model": folder})
    with Silent() as address:
        environment = {
            "refused": {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "silent": {"HF_ENDPOINT": address},
            "no such name": {"HF_ENDPOINT": "https://hub.invalid"},
            "offline": {"HF_HUB_OFFLINE": "1"},
        }[how]
        done = asked(cache, **environment)
        assert str(cache) in done.stdout and "some/model is taken from the cache" in done.stderr, done.stderr
        done = asked(tmp_path / "empty", **environment)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "isn't in the cache" in line and "hf download some/model" in line
    assert ("HF_HUB_OFFLINE is set" if how == "offline" else "can't be reached") in line


@pytest.mark.parametrize(
    ("files", "ignored"),
    [
        (["config.json", "model-00001-of-2.safetensors", "pytorch_model-1.bin"], ["pytorch_model*.bin"]),
        (["config.json", "pytorch_model.bin"], []),
        (["adapter_model.safetensors", "non_lora_trainables.bin"], []),
    ],
)
def test_one_format_is_downloaded(monkeypatch, tmp_path, files, ignored):
    asked = {}

    def download(repo_id, **kwargs):
        asked.update(kwargs, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(locate, "_answers", lambda address: True)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo_id: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model("some/model") == tmp_path
    assert asked["repo_id"] == "some/model" and asked["ignore_patterns"] == ignored
    assert "*.py" not in asked["allow_patterns"]


def test_a_cache_folder_of_ones_own(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    found = locate_model("some/model", cache_dir=hub_cache(tmp_path / "cache", {"some/model": folder}))
    assert (tmp_path / "cache") in found.parents and (found / "config.json").read_text() == "{}"
    with pytest.raises(LlavaError, match="model not found: there is no folder some/model"):
        locate_model("some/model", cache_dir=tmp_path / "other")


def test_a_tower_that_a_checkpoint_names_is_in_that_cache_too(tmp_path):
    folder = make_llava(tmp_path)
    whole = load_pretrained_model(folder, device="cpu").model.state_dict()
    weights = WeightFiles.of_folder(folder)
    rest = {name: weights.read(name).clone() for name in weights if "vision_tower" not in name}
    save(rest, folder / "model.safetensors")
    changed = {"mm_vision_tower": "some/tower", "mm_vision_config": None}
    write_json(folder / "config.json", read_json(folder / "config.json") | changed)
    with pytest.raises(LlavaError, match="vision tower not found: there is no folder some/tower"):
        load_pretrained_model(folder, device="cpu")
    cache = hub_cache(tmp_path / "cache", {"some/tower": tmp_path / "clip"})
    loaded = load_pretrained_model(folder, device="cpu", cache_dir=cache).model.state_dict()
    assert loaded.keys() == whole.keys() and all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_an_upload_that_finds_no_hub_is_said_in_one_line(tmp_path, monkeypatch):
    """Once the work is done: the folder stays."""
    for name, value in (("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LlavaError, match="is complete, but uploading it to some/model failed"):
        upload_folder(tmp_path, "some/model")
    assert (tmp_path / "config.json").is_file()
