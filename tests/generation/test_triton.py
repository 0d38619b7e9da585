"""The project's own kernels: what they compute, not how fast. Without a GPU Triton's interpreter runs them
(`TRITON_INTERPRET`, set in tests/conftest.py before anything imports Triton)."""

import itertools

import numpy as np
import pytest
import torch

from llava.generation import Engine
from llava.generation.attention import joined, kernels
from llava.generation.attention.kernels import Batch, PagedKernel, gathered
from tests.generation.conftest import mixed_requests

triton_kernel, fused = (
    pytest.importorskip(f"llava.generation.attention.{name}", reason="triton isn't installed (extra `dev`)")
    for name in ("triton_kernel", "fused")
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def device():
    with torch.device(DEVICE):
        yield


def made(news, before, heads, kv_heads, size, page=16):
    """Queries, keys, values and a batch of rows whose pages lie anywhere."""
    torch.manual_seed(len(news) + size)
    used = [new + old for new, old in zip(news, before, strict=True)]
    counts = [-(-length // page) for length in used]
    table = torch.zeros(len(news), max(counts) + 3, dtype=torch.int32)
    numbers = iter(torch.randperm(sum(counts)) + 1)
    for line, count in zip(table, counts, strict=True):
        line[:count] = torch.tensor(list(itertools.islice(numbers, count)))
    keys, values = torch.randn(sum(counts) + 1, page, 2, kv_heads, size).unbind(2)
    queries = torch.randn(sum(news), heads + 2 * kv_heads, size).narrow(1, 0, heads)  # a part, as in a layer
    starts, key_starts = (torch.tensor([0, *np.cumsum(one)], dtype=torch.int32) for one in (news, used))
    return queries, keys, values, Batch(table, starts, torch.tensor(used).int(), key_starts, max(news))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("heads, kv_heads, size", [(2, 2, 64), (9, 3, 64), (4, 1, 96)])
@pytest.mark.parametrize(
    "news, before", [((1, 1, 1), (70, 0, 260)), ((1, 7, 30, 1), (70, 0, 33, 199)), ((40, 1), (0, 5))]
)
def test_attention_over_pages_is_that_over_gathered_ones(news, before, heads, kv_heads, size, window):
    inputs = made(news, before, heads, kv_heads, size)
    found, expected = (one(*inputs, size**-0.5, window) for one in (triton_kernel.attend, gathered))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 64), (9, 3, 24), (4, 1, 8)])
def test_turning_and_putting_is_that_of_torch(heads, kv_heads, size):
    torch.manual_seed(0)
    angles = torch.rand(50, size // 2) * 6
    tables = [
        torch.stack([one, other], 1) for one, other in ((angles.cos(), angles.cos()), (-angles.sin(), angles.sin()))
    ]
    projected, positions = torch.randn(3, heads + 2 * kv_heads, size), torch.tensor([4, 49, 0])
    slots = torch.tensor([33, 2, 63])
    results = []
    for is_fused in (True, False):
        pages = torch.zeros(4, 16, 2, kv_heads, size)
        cos, sin = (one[positions].unsqueeze(1) for one in tables)
        rotation = joined.FusedRotation(fused, tables[0][:, 0], tables[1][:, 1], positions)
        results.append(
            ((rotation if is_fused else joined.TabledRotation(cos, sin)).put(projected.clone(), pages, slots), pages)
        )
    torch.testing.assert_close(*results)
    assert results[0][1].count_nonzero() == projected[:, heads:].count_nonzero(), "other slots were written"


def test_the_gate_is_that_of_torch():
    torch.manual_seed(0)
    given = torch.randn(3, 2 * 1100)
    torch.testing.assert_close(fused.gated(given), joined.Plain.gated(given))


def test_the_norm_is_that_of_torch():
    torch.manual_seed(0)
    given, weight = torch.randn(3, 600), torch.randn(600)
    torch.testing.assert_close(fused.normed(given, weight, 1e-5), joined.Plain.normed(given, weight, 1e-5))


@pytest.mark.skipif(DEVICE == "cuda", reason="the models of these tests are on the CPU")
def test_an_engine_of_them_gives_the_same_answers(llama, images, monkeypatch):
    requests = mixed_requests(images, count=3, max_new_tokens=3)
    expected = [answer.token_ids for answer in Engine(llama, paged=True).generate(requests)]
    calls = []

    def attend(*args):
        calls.append(args)
        return triton_kernel.attend(*args)

    monkeypatch.setattr("llava.generation.runner.working_kernel", lambda *_: PagedKernel("own", attend, 16))
    monkeypatch.setattr("llava.generation.runner.working_fused", lambda _: fused)
    assert [answer.token_ids for answer in Engine(llama, paged=True).generate(requests)] == expected
    assert calls


def test_the_installed_kernels_include_it():
    assert "llava.generation.attention.triton_kernel" in [kernel.name for kernel in kernels.signatures()]
