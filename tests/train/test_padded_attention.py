"""Attention of packed samples without a kernel for them, against softmax written out for each sequence."""

import math
import tracemalloc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava.train.step import padded_attention
from llava.train.step.padded_attention import MOST_SCORES

SIZE = 8
LONG = math.isqrt(MOST_SCORES) + 60
# Two images: what is shared, then questions; a sample alone; one that is too long to be padded.
OWN = [30, 7, 9, 5, 33, 6, 8, 40, LONG]
SEEN = [30, 37, 39, 35, 33, 39, 41, 40, LONG]


def borders(sizes):
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def places():
    """Each question sees what is shared, then itself."""
    starts = borders(OWN).tolist()
    shared = {1: 0, 2: 0, 3: 0, 5: 4, 6: 4}
    parts = []
    for number, (start, size) in enumerate(zip(starts, OWN)):
        if number in shared:
            first = shared[number]
            parts.append(torch.arange(starts[first], starts[first] + OWN[first]))
        parts.append(torch.arange(start, start + size))
    return torch.cat(parts)


def tensors(query_heads, key_heads, dtype):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(OWN), heads, SIZE, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (query_heads, key_heads, key_heads)
    ]


def reference(q, k, v, window, scale):
    """In float64, sequence by sequence."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    times = q.shape[1] // k.shape[1]
    outputs = []
    for queries, seen in zip(q.split(OWN), places().split(SEEN)):
        keys, values = (tensor[seen].repeat_interleave(times, 1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        rank = torch.arange(len(seen))
        last = rank[len(seen) - len(queries) :, None]
        sees = (rank <= last) & (rank > last - (window or len(seen)))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


def attend(q, k, v, window=None, scale=None):
    return padded_attention.padded_attention(
        q, k, v, borders(OWN), borders(SEEN), key_places=places(), window=window, scale=scale
    )


@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("window", [None, 4, 36])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_values_and_gradients_are_those_of_each_sequence_alone(key_heads, window, scale):
    ours, theirs = (tensors(6, key_heads, torch.float32) for _ in range(2))
    out = attend(*ours, window, scale)
    expected = reference(*theirs, window, SIZE**-0.5 if scale is None else scale)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, true in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, true.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [[LONG, 12, 14, LONG + 40, 300], [LONG, LONG + 7], [9, 0, LONG], [0, LONG]], ids=str)
@pytest.mark.parametrize("window", [None, 36])
def test_long_sequences_among_short_ones_are_each_alone_too(sizes, window):
    """What packs of whole samples hold, each of which sees itself."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(sum(sizes), heads, SIZE) for heads in (6, 2, 2)]
    ours = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    out = padded_attention.padded_attention(*ours, borders(sizes), borders(sizes), window=window)
    alone = [
        padded_attention.padded_attention(
            *sequence, *[borders([size])] * 2, key_places=torch.arange(size), window=window
        )
        for size, *sequence in zip(sizes, *(tensor.split(sizes) for tensor in theirs))
        if size
    ]
    torch.testing.assert_close(out, torch.cat(alone), rtol=1e-4, atol=1e-5)
    weights = torch.randn(out.shape, generator=generator)
    (out * weights).sum().backward()
    (torch.cat(alone) * weights).sum().backward()
    for mine, true in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, true.grad, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_is_as_near_as_bfloat16_is():
    ours, theirs = (tensors(6, 2, torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*ours)
    assert out.dtype == torch.bfloat16
    expected = reference(*theirs, None, SIZE**-0.5)
    assert (out - expected).norm() < 0.01 * expected.norm()


class ProductTypes(TorchDispatchMode):
    """Types of what is multiplied in batches."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.seen |= {tensor.dtype for tensor in args}
        return func(*args, **(kwargs or {}))


def test_products_whose_sizes_change_are_not_bfloat16s_on_the_cpu():
    """oneDNN keeps half a megabyte for each new size: 400 steps of one layer alone took 0.5 GB."""
    with ProductTypes() as products:
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*tensors(6, 2, torch.bfloat16))
        out.float().sum().backward()
    assert products.seen == {torch.float32}


def test_dropout_leaves_out_and_scales_up():
    q, k, v = tensors(6, 2, torch.float32)
    lengths = borders(OWN)
    torch.manual_seed(0)
    ones = padded_attention.padded_attention(q, k, torch.ones_like(v), lengths, lengths, dropout=0.5)
    assert ones[:30].std() > 0.1 and ones.mean().item() == pytest.approx(1, abs=0.05)


def test_sequences_of_about_one_size_are_computed_together():
    layout = padded_attention._layout(tuple(OWN), tuple(SEEN), None)
    sizes = [tuple(bucket.keys.shape) for bucket in layout.buckets]
    assert sizes[0] == (5, 41), "the questions"
    assert sizes[-1] == (1, LONG) and layout.buckets[-1].hidden is None
    computed = sum(bucket.queries.numel() * bucket.keys.shape[1] for bucket in layout.buckets)
    assert computed <= 1.5 * sum(own * seen for own, seen in zip(OWN, SEEN))
    assert sorted(layout.places.tolist()) == layout.places.unique().tolist(), "no row is taken twice"


def test_a_long_sequence_alone_has_no_table_of_who_sees_whom():
    tracemalloc.start()
    try:
        padded_attention._layout((4096,), (4096,), None)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 4096**2, "a byte for each pair"
