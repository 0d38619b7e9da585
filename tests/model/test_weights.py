"""Reading weight files: by name, in place, safetensors before .bin."""

import json
import struct

import pytest
import torch

from llava.errors import LlavaError
from llava.model.weights.files import WeightFiles, find_weight_files
from tests.model.checkpoints import save

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float16).reshape(3, 4),
    "brain": torch.rand(5, 2).bfloat16(),
    "scalar": torch.tensor(3, dtype=torch.uint8),
    "none": torch.zeros(0, 4),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_read_and_copy(tmp_path, name):
    save(TENSORS, tmp_path / name)
    weights = WeightFiles.of_folder(tmp_path)
    assert sorted(weights) == sorted(TENSORS) and len(weights) == 4 and "matrix" in weights
    for key, tensor in TENSORS.items():
        assert (weights.shape(key), weights.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert weights.file_of(key) == tmp_path / name
        assert torch.equal(weights.read(key), tensor)
        copy = weights.copy(key)
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
        copy.zero_()
        assert torch.equal(weights.read(key), tensor), "a copy has memory of its own"


def test_copy_of_a_tensor_larger_than_a_block(tmp_path):
    tensor = torch.rand(5_000_000)
    save({"small": torch.ones(3), "large": tensor}, tmp_path / "model.safetensors")
    assert torch.equal(WeightFiles.of_folder(tmp_path).copy("large"), tensor)


def test_file_that_was_cut_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    save({"large": torch.rand(100_000)}, path)
    weights = WeightFiles([path])
    with path.open("rb+") as file:
        file.truncate(200_000)
    with pytest.raises(LlavaError, match=r"model\.safetensors: can't be read.*large ends early"):
        weights.copy("large")


def test_old_pickles_without_a_zip_archive(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(WeightFiles.of_folder(tmp_path).read("matrix"), TENSORS["matrix"])


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {"state_dict": {"a": torch.ones(1)}}])
def test_bin_that_holds_no_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(LlavaError, match=r"pytorch_model\.bin: .*(named tensors|not a tensor)"):
        WeightFiles.of_folder(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[]"])
def test_index_without_a_map(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(LlavaError, match="has no weight_map"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("shard", [5, ["x"], None, {}, "a\0b"])
def test_index_whose_shards_are_no_names(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard, "b": "y"}}))
    with pytest.raises(LlavaError, match="no file's name"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize(("kind", "size"), [("U16", 4), ("U32", 8), ("C64", 16), ("F8_E8M0", 2), ("F4", 1)])
def test_types_that_no_weights_have_are_named(tmp_path, kind, size):
    header = json.dumps({"a": {"dtype": kind, "shape": [2], "data_offsets": [0, size]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(LlavaError, match=f"a is of the type {kind}"):
        WeightFiles.of_folder(tmp_path)


VIEW = torch.zeros(1).expand(1 << 40)
SPARSE = torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,), check_invariants=True)


@pytest.mark.parametrize("tensor", [VIEW, SPARSE], ids=["view", "sparse"])
def test_tensors_that_are_larger_than_their_file(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LlavaError, match=r"'w' (has the shape|is a sparse)"):
        WeightFiles.of_folder(tmp_path)


def test_order_of_preference(tmp_path):
    assert find_weight_files(tmp_path) == []
    save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert [path.name for path in find_weight_files(tmp_path)] == ["pytorch_model.bin"]
    save({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert [path.name for path in find_weight_files(tmp_path)] == ["model.safetensors"]
    save({"x": torch.ones(1)}, tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "shard.safetensors"}}))
    assert [path.name for path in find_weight_files(tmp_path)] == ["shard.safetensors"]


def test_a_whole_file_beside_an_index_is_said_once(tmp_path, caplog):
    index = tmp_path / "model.safetensors.index.json"
    save({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    assert find_weight_files(tmp_path) == [tmp_path / "model.safetensors"] and not caplog.records
    save({"x": torch.ones(2)}, tmp_path / "shard.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "shard.safetensors"}}))
    for _ in range(2):
        assert WeightFiles.of_folder(tmp_path).read("x").tolist() == [1, 1]
    (said,) = caplog.messages
    assert f"{tmp_path}: model.safetensors lies beside model.safetensors.index.json" in said and "index's files" in said
