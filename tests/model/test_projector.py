"""The projector's forms and the key names that LLaVA gives them."""

import pytest
import torch

from llava.errors import LlavaError
from llava.model.convert.projector_extract import extract_projector
from llava.model.projector import build_projector
from tests.tiny import make_llava


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_keys_and_shapes(kind, keys):
    projector = build_projector(kind, 6, 10)
    assert list(projector.state_dict()) == keys
    assert projector(torch.zeros(2, 5, 6)).shape == (2, 5, 10)


def test_mlp_is_linear_gelu_linear():
    projector = build_projector("mlp2x_gelu", 6, 10)
    values = torch.rand(3, 6)
    expected = projector[2](torch.nn.functional.gelu(projector[0](values)))
    assert torch.equal(projector(values), expected)


def test_identity():
    values = torch.rand(3, 6)
    assert torch.equal(build_projector("identity", 6, 6)(values), values)
    with pytest.raises(LlavaError, match="one width, but they have 6 and 10"):
        build_projector("identity", 6, 10)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "mlp2x", "", "qformer"])
def test_unknown(kind):
    with pytest.raises(LlavaError, match="unknown mm_projector_type"):
        build_projector(kind, 6, 10)


@pytest.mark.parametrize("layers", ["17", "1000000", "9" * 5000])
def test_no_projector_is_endless(layers):
    with pytest.raises(LlavaError, match="at most 16 layers"):
        build_projector(f"mlp{layers}x_gelu", 6, 10)
    assert len(build_projector("mlp16x_gelu", 6, 10)) == 31


def test_what_a_training_run_says_of_itself_is_not_extracted(tmp_path):
    """It holds paths of the machine and names of records."""
    folder = make_llava(tmp_path)
    own = ("training_summary.json", "training_flags.json", "manifest.json", "trainer_state.json")
    for name in own:
        (folder / name).write_text("{}")
    extract_projector(folder, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert not [name for name in own if (tmp_path / "out" / name).exists()]
