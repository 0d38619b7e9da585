"""Products by oneDNN: the same numbers, in answering alone."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava.generation import Engine
from llava.model import load_pretrained_model, products
from llava.model.products import OneDnnLinear, has_onednn, padded_rows, use_onednn
from tests import tiny
from tests.generation.conftest import ask

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="torch is built without oneDNN here")


@pytest.fixture
def however_small(monkeypatch):
    """oneDNN computes products that torch's own library would be faster at, too."""
    monkeypatch.setattr(products, "_LEAST_BYTES", 0)


class Counting(TorchDispatchMode):
    """How often oneDNN's product was taken, and torch's own."""

    def __init__(self):
        super().__init__()
        self.onednn = self.own = 0
        self.rows: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mkldnn._linear_pointwise" in str(function):
            self.onednn += 1
            self.rows.add(len(args[0]))
        self.own += any(name in str(function) for name in ("aten.linear", "aten.mm", "aten.addmm"))
        return function(*args, **(kwargs or {}))


@needs_onednn
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5), (2, 0)])
def test_the_same_numbers(shape, has_bias, however_small):
    torch.manual_seed(0)
    module = nn.Linear(48, 33, bias=has_bias)
    states = torch.randn(*shape, 96)[..., ::2]
    with torch.no_grad():
        expected = module(states)
        use_onednn(module)
        with Counting() as counts:
            found = module(states)
    assert counts.onednn == 1 and counts.own == 0 and type(module) is OneDnnLinear
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_however_many_rows_there_are_products_have_few_sizes(however_small):
    """oneDNN keeps what it makes for each size."""
    module = OneDnnLinear(4, 3)
    with torch.no_grad(), Counting() as counts:
        for rows in [*range(1, 2100), *range(2100, 20_000, 100), 40_000]:
            assert module(torch.ones(rows, 4)).shape == (rows, 3)
    assert max(counts.rows) == 16_384 and len(counts.rows) == 56
    assert all(count <= padded_rows(count) <= 1.25 * count for count in range(1, 16_385))


@needs_onednn
@pytest.mark.parametrize("rows", [9, 2048, 16_384, 16_385, 35_000])
def test_padded_and_divided_products_are_the_same(rows, however_small):
    torch.manual_seed(0)
    module = nn.Linear(16, 8)
    states = torch.randn(rows, 16)
    with torch.no_grad():
        expected = module(states)
        use_onednn(module)
        torch.testing.assert_close(module(states), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(module(states[0]), expected[0], atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "is_onednn"), [(8, 64, 64, 0), (1024, 64, 64, 1), (1, 512, 512, 1)]
)
def test_what_is_too_small_for_its_start_is_torchs_own(rows, inputs, outputs, is_onednn):
    with torch.no_grad(), Counting() as counts:
        OneDnnLinear(inputs, outputs)(torch.ones(rows, inputs))
    assert counts.onednn == is_onednn


def test_training_is_as_before():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False))
    other = copy.deepcopy(plain)
    use_onednn(other)
    states = torch.randn(5, 8)
    for model in (plain, other):
        model(states).square().sum().backward()
    assert plain.state_dict().keys() == other.state_dict().keys()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_half_precision_and_hooked_modules_are_left_alone():
    half = nn.Linear(8, 8).to(torch.bfloat16)
    hooked = nn.Linear(8, 8)
    hooked.forward = lambda states: states
    use_onednn(nn.ModuleList([half, hooked]))
    assert type(hooked) is nn.Linear
    with torch.no_grad(), Counting() as counts:
        half(torch.ones(2, 8, dtype=torch.bfloat16))
    assert counts.onednn == 0


@needs_onednn
def test_the_engine_takes_them_and_a_model_in_training_does_not(tmp_path, however_small):
    loaded = load_pretrained_model(tiny.make_llava(tmp_path), device="cpu")
    requests = [ask("Is it there?", max_new_tokens=5, ignore_eos=True)]
    with Counting() as training:
        expected = Engine(loaded, paged=False).generate(requests)
    assert training.onednn == 5 and training.own, "its head alone"
    with Counting() as counts:
        found = Engine(loaded).generate(requests)
    assert counts.own == 0 and counts.onednn
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert Engine(loaded, paged=True).scheduler.runner.decoder is not None
