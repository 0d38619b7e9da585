"""4-bit Linears on a CPU: exact at every width, on every processor, before and after evaluating, moving and saving."""

import copy
import io

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from llava.model.weights.linear4bit import Linear4bit, compute_exactly, dequantized  # noqa: E402

WIDTHS = [64, 128, 176, 96, 48, 40, 33, 1]
"""Multiples of the block, of 16 and not of the block, of neither, odd."""


def made(width: int, outputs: int = 48, nested: bool = True, kind: str = "nf4") -> torch.nn.Sequential:
    """A quantized Linear whose rows differ much in size, so that a wrong scale is seen."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(width, outputs))
    plain[0].weight.data *= torch.logspace(-2, 1, outputs)[:, None]
    four = torch.nn.Sequential(
        bitsandbytes.nn.Linear4bit(width, outputs, compress_statistics=nested, quant_type=kind, compute_dtype=None)
    )
    four.load_state_dict(plain.state_dict())
    compute_exactly(four)
    return four.to("cpu").eval()


def written_out(layer: bitsandbytes.nn.Linear4bit) -> torch.Tensor:
    """The weight from its definition: value of each nibble times the scale of its 64 in the flat weight."""
    state, packed = layer.weight.quant_state, layer.weight.detach().flatten()
    values = state.code[torch.stack([packed >> 4, packed & 15], dim=-1).flatten().long()]
    scales = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
        scales = state.state2.code[scales.long()] * outer + state.offset
    count = state.shape.numel()
    return (values[:count] * scales.repeat_interleave(state.blocksize)[:count]).reshape(state.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(processor, width, nested, kind):
    model = made(width, nested=nested, kind=kind)
    weight, packed = written_out(model[0]), model[0].weight
    assert torch.allclose(dequantized(packed, packed.quant_state, torch.float32), weight, rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 3, width)
    with torch.no_grad():
        wanted = torch.nn.functional.linear(x, weight, model[0].bias)
        assert torch.allclose(model(x), wanted, rtol=1e-4, atol=1e-4)
        assert torch.allclose(model(x[0, 0]), wanted[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [1, 31, 64])
def test_every_output_width(processor, outputs):
    model = made(80, outputs)
    x = torch.randn(5, 80)
    with torch.no_grad():
        wanted = torch.nn.functional.linear(x, written_out(model[0]), model[0].bias)
        assert torch.allclose(model(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(processor, dtype):
    model = made(176)
    x = torch.randn(5, 176).to(dtype)
    with torch.no_grad():
        exact = torch.nn.functional.linear(x.float(), written_out(model[0]), model[0].bias)
        found = model(x)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), exact, rtol=0.02, atol=0.05 * exact.abs().mean().item())


@pytest.mark.parametrize("width", [128, 176])
def test_gradients_before_and_after_an_evaluation(processor, width):
    model = made(width)
    x = torch.randn(5, width, requires_grad=True)
    for _ in range(2):
        gradient = torch.autograd.grad(model.train()(x).square().sum(), x)[0]
        with torch.no_grad():
            result = torch.nn.functional.linear(x, written_out(model[0]), model[0].bias)
            assert torch.allclose(gradient, 2 * result @ written_out(model[0]), rtol=1e-3, atol=1e-3)
            model.eval()(x.detach())


@pytest.mark.parametrize("width", [128, 176])
def test_evaluating_changes_nothing_that_is_saved(processor, width):
    model = made(width)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model(torch.randn(5, width))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_copies_and_moves_compute_alike(processor):
    model = made(176)
    x = torch.randn(5, 176)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    copies = [
        copy.deepcopy(model),
        copy.deepcopy(model).to("cpu"),
        copy.deepcopy(model).to(torch.bfloat16).float(),
        torch.load(pickled, weights_only=False),
    ]
    with torch.no_grad():
        for other in copies:
            assert type(other[0]) is Linear4bit
            assert torch.allclose(other(x), model(x), rtol=0.01, atol=0.05)
