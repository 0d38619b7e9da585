"""average: each weight is the mean of those given, and models without a mean are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import LlavaError
from llava.model import average, load_pretrained_model
from llava.model.weights.files import WeightFiles
from llava.records import read_json, write_json
from tests.tiny import make_llava


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Three runs from one checkpoint, in bfloat16."""
    first = make_llava(tmp_path_factory.mktemp("models") / "run", "llama")
    return [first, *(another(first, first.parent / f"run_{seed}", seed) for seed in (1, 2))]


def another(source: Path, folder: Path, seed: int) -> Path:
    shutil.copytree(source, folder)
    random = torch.Generator().manual_seed(seed)
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor + torch.randn(tensor.shape, generator=random).to(tensor.dtype)
                   for name, tensor in load_file(path).items()}  # fmt: skip
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("count", [2, 3])
def test_each_weight_is_the_mean_rounded_once(models, tmp_path, capsys, count):
    average.main(["--models", *map(str, models[:count]), "--output", str(tmp_path / "mean")])
    assert f"the mean of {count} checkpoints, complete and verified" in capsys.readouterr().out
    given, mean = [WeightFiles.of_folder(folder) for folder in models[:count]], WeightFiles.of_folder(tmp_path / "mean")
    assert set(mean) == set(given[0])
    for name in mean:
        parts = [one.read(name) for one in given]
        expected = sum(part.float() for part in parts) / count
        assert torch.equal(mean.read(name), expected.to(parts[0].dtype)), name
    assert len({tuple(given[k].read(name).flatten()[:2].tolist()) for k in range(count)}) == count
    loaded = load_pretrained_model(tmp_path / "mean", device="cpu")
    assert loaded.tokenizer.get_vocab() == load_pretrained_model(models[0], device="cpu").tokenizer.get_vocab()


def test_a_model_of_other_parts_is_refused(models, tmp_path):
    other = make_llava(tmp_path / "other", "llama", mm_projector_type="mlp2x_gelu")
    with pytest.raises(LlavaError, match=r"only checkpoints of one model, trained in different ways, have a mean"):
        average.main(["--models", str(models[0]), str(other), "--output", str(tmp_path / "mean")])
    assert not (tmp_path / "mean").exists() and not list(tmp_path.glob(".mean*"))


def test_other_tokens_are_refused(models, tmp_path):
    other = shutil.copytree(models[1], tmp_path / "other")
    tokens = read_json(other / "tokenizer.json")
    vocabulary = tokens["model"]["vocab"]
    names = list(vocabulary)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    write_json(other / "tokenizer.json", tokens, overwrite=True)
    with pytest.raises(LlavaError, match="its tokens are not those of"):
        average.main(["--models", str(models[0]), str(other), "--output", str(tmp_path / "mean")])
    assert not (tmp_path / "mean").exists()


def test_one_checkpoint_has_no_mean(models, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        average.main(["--models", str(models[0]), "--output", str(tmp_path / "mean")])
    assert end.value.code == 2 and "give two checkpoints or more" in capsys.readouterr().err
