"""G6: delta weights made and applied, bit for bit as the reference in float16."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava.model.convert.delta import apply_delta, make_delta
from llava.model.weights.files import WeightFiles, is_harmless
from tests.conftest import golden_cases

CASES = golden_cases("G6_delta", marker="checksums.json")
TOKENIZER = "common/tokenizers/llama_v10/tokenizer.model"


@pytest.fixture(params=CASES)
def case(request) -> tuple[Path, str]:
    """The folder of expectations and the number of rows that its name ends in."""
    return request.param, request.param.name.removeprefix("applied_")


def digest(weights: WeightFiles, name: str) -> str:
    return hashlib.sha256(weights.read(name).contiguous().numpy().tobytes()).hexdigest()


def test_applied(case, golden_dir, tmp_path):
    folder, rows = case
    group = folder.parent
    delta = tmp_path / "delta"
    shutil.copytree(group / f"delta_{rows}", delta)
    delta.chmod(0o755)
    shutil.copyfile(golden_dir / TOKENIZER, delta / "tokenizer.model")
    result = apply_delta(group / "base", tmp_path / "target", delta)
    expected = json.loads((folder / "checksums.json").read_text())
    sample = np.load(folder / "applied_sample.npz")
    weights = WeightFiles.of_folder(result)
    assert set(weights) == {name for name in expected if not is_harmless(name)}
    for name in weights:
        assert list(weights.shape(name)) == expected[name]["shape"]
        assert str(weights.dtype(name)) == expected[name]["dtype"]
        assert digest(weights, name) == expected[name]["sha256_applied"], name
        tensor = weights.read(name).numpy()
        if tensor.shape == sample[name].shape:
            assert np.array_equal(tensor, sample[name])
    for path in sorted(delta.iterdir()):
        if path.suffix in {".json", ".model"}:
            assert (result / path.name).read_bytes() == path.read_bytes(), path.name


def test_made(case, tmp_path):
    folder, rows = case
    group = folder.parent
    result = make_delta(group / "base", group / f"target_{rows}", tmp_path / "delta")
    expected = json.loads((folder / "checksums.json").read_text())
    weights = WeightFiles.of_folder(result)
    assert set(weights) == {name for name in expected if not is_harmless(name)}
    for name in weights:
        assert digest(weights, name) == expected[name]["sha256_delta"], name
