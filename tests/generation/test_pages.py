"""Keys and values in pages, layers in joined products, decoding from the device: the same answers, and less memory."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava.generation import Engine, Request
from llava.generation.attention.kernels import (
    GATHERED,
    Batch,
    flash_2_kernel,
    flash_3_kernel,
    torch_kernel,
    working_fused,
    working_kernel,
)
from llava.generation.cache.pages import PageCache
from llava.generation.cache.rows import RowCache
from llava.generation.decoding import Decoder
from tests.generation.conftest import answer_alone, ask, assert_same, mixed_requests


def paged(loaded, cache_bytes=1 << 26, **options):
    return Engine(loaded, paged=True, cache_bytes=cache_bytes, **options)


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def ahead(request, monkeypatch):
    """As on a GPU: the next step is started before the tokens of the last are read."""
    made = Decoder.__init__

    def init(self, *args):
        made(self, *args)
        self.runs_ahead = request.param

    monkeypatch.setattr(Decoder, "__init__", init)
    return request.param


def pages_in_use(engine) -> int:
    return engine.scheduler.runner.cache.pages_in_use


def test_answers_are_those_of_single_generation(loaded, images, ahead):
    """All families, batched: token by token as transformers, up to a close call."""
    engine = paged(loaded, prefix_bytes=0)
    assert engine.scheduler.runner.decoder is not None, "the layers weren't joined"
    requests = mixed_requests(images)
    for request, answer in zip(requests, engine.generate(requests)):
        assert_same(*answer_alone(loaded, engine, request), answer.token_ids)
    assert pages_in_use(engine) == 0, "pages of finished rows are free at once"


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.9, "seed": 5, "top_p": 0.9}, {"repetition_penalty": 1.3}, {"logprobs": 2}]
)
def test_sampled_answers_are_those_of_rows(llama, images, sampling, ahead):
    requests = mixed_requests(images, **sampling)
    expected = [answer.text for answer in Engine(llama).generate(requests)]
    assert [answer.text for answer in paged(llama, max_batch_size=5).generate(requests)] == expected


def test_a_request_that_joins_changes_nothing(llama, images, ahead):
    engine = paged(llama)
    first, second = ask("One?", max_new_tokens=30, ignore_eos=True), ask("Two?", [images[0]], max_new_tokens=9)
    with engine.submit(first) as handle:
        pieces = iter(handle)
        next(pieces)
        with engine.submit(second) as other:
            list(other)
        list(pieces)
    alone = [Engine(llama).generate([request])[0].token_ids for request in (first, second)]
    assert [handle.answer.token_ids, other.answer.token_ids] == alone


def test_the_next_turn_shares_the_pages_of_the_last(llama, images, ahead):
    """By reference: of a beginning that is kept, only a page in part is copied."""
    engine = paged(llama)
    request = ask("What is it? " * 6, [images[0]], max_new_tokens=4)
    (first,) = (run_kept(engine, request) for _ in range(1))
    kept = pages_in_use(engine)
    again = run_kept(engine, request)
    assert again.token_ids == first.token_ids and again.cached_tokens > 16
    assert pages_in_use(engine) <= kept + 1
    engine.scheduler.prefixes.clear()
    assert pages_in_use(engine) == 0


def run_kept(engine, request):
    with engine.submit(request) as handle:
        list(handle)
    return handle.answer


def test_little_memory_means_waiting_and_the_same_answers(llama, images, ahead):
    requests = mixed_requests(images, max_new_tokens=40, ignore_eos=True)
    expected = [answer.token_ids for answer in Engine(llama).generate(requests)]
    longest = max(len(Engine(llama).prompts.build(request)) for request in requests) + 40
    position = Engine(llama).scheduler.runner.bytes_per_position
    engine = paged(llama, cache_bytes=2 * (longest + 16) * position)
    assert [answer.token_ids for answer in engine.generate(requests)] == expected
    assert engine.scheduler.counts.preempted > 0


def test_a_model_in_other_modules_goes_through_them(llama, images, monkeypatch):
    """As quantized ones do: pages without joined layers."""
    monkeypatch.setattr("llava.generation.runner.join_layers", lambda *_: None)
    engine = paged(llama)
    assert engine.scheduler.runner.decoder is None
    requests = mixed_requests(images)
    expected = [answer.token_ids for answer in Engine(llama).generate(requests)]
    assert [answer.token_ids for answer in engine.generate(requests)] == expected


def test_steps_are_started_ahead_and_rows_that_leave_disturb_nobody(llama, images, monkeypatch):
    """Answers of many lengths, one of them given up: of each step the others' tokens are those of an engine alone."""
    requests = [ask(f"What is {n}?", max_new_tokens=3 + 5 * n, ignore_eos=True, id=n) for n in range(6)]
    expected = [answer.token_ids for answer in Engine(llama).generate(requests)]
    engine = paged(llama, prefix_bytes=0)
    engine.scheduler.runner.decoder.runs_ahead = True
    computed = []
    step = engine.scheduler.runner.decoder.step
    monkeypatch.setattr(engine.scheduler.runner.decoder, "step", lambda state: computed.append(1) or step(state))
    handles = [engine.submit(request) for request in requests]
    for _ in range(6):
        engine._advance()
    assert engine.scheduler._ahead is not None
    handles[4].cancel()
    while not engine.scheduler.is_idle:
        engine._advance()
    answers = [list(handle) and handle.answer.token_ids for handle in handles]
    assert [answers[n] for n in (0, 1, 2, 3, 5)] == [expected[n] for n in (0, 1, 2, 3, 5)]
    assert answers[4] == expected[4][: len(answers[4])] and 5 < len(answers[4]) < 9
    assert pages_in_use(engine) == 0
    # Nothing is computed twice but what follows a row that left: 28 steps after the first, a few more at most.
    assert 27 <= len(computed) <= 27 + 5


class Copied(TorchDispatchMode):
    """Bytes that operators write to tensors as large as a layer's keys and values."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.bytes = least, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view and not function._schema.is_mutable:
            size = out.numel() * out.element_size()
            self.bytes += size * (size >= self.least)
        return out


@pytest.mark.parametrize("has_pages", [True, False])
def test_a_row_that_grows_copies_nothing(llama, has_pages):
    """Over 200 tokens, thirteen pages of a row, no tensor of the cache is made again, also when a wider one joins."""
    engine = Engine(llama, paged=has_pages, prefix_bytes=0, cache_bytes=1 << 24)
    handle = engine.submit(ask("Go on?", max_new_tokens=200, ignore_eos=True))
    for _ in range(3):
        engine._advance()
    cache = engine.scheduler.runner.cache
    assert isinstance(cache, PageCache if has_pages else RowCache)
    before = [layer.data_ptr() for layer in cache.layers]
    with Copied(cache.layers[0].nbytes // 16) as copied:
        engine.submit(ask("And what is this? " * 20, max_new_tokens=100, ignore_eos=True))
        while not engine.scheduler.is_idle:
            engine._advance()
    assert copied.bytes == 0
    assert [layer.data_ptr() for layer in cache.layers] == before
    assert len(handle._news.get().token_ids) == 1


def test_rows_of_mixed_lengths_waste_less_than_a_twentieth():
    lengths = [int(length) for length in np.random.default_rng(0).integers(200, 1200, 64)]
    cache = PageCache(1, 1, 4, 4 * 64 * 1300, 2000)
    assert cache.holds(lengths)
    cache.prepare([length // 2 for length in lengths], 0)
    for row, length in enumerate(lengths):
        for now in range(length // 2, length + 1):
            cache.extend(row, now)
    assert 1 - sum(lengths) / (cache.pages_in_use * cache.page) < 0.05
    cache.trim(1)
    assert cache.pages_in_use == -(-lengths[0] // cache.page)
    cache.release()
    assert cache.pages_in_use == 0
    with pytest.raises(torch.OutOfMemoryError):
        cache.prepare([1300] * 65, 0)


def dense(queries, keys, values, batch, scale, window):
    """Row by row, softmax written out."""
    outs = []
    for row, used in enumerate(batch.used.tolist()):
        begin, end = batch.starts[row : row + 2].tolist()
        known, seen = (states[batch.table[row].long()].flatten(0, 1)[:used] for states in (keys, values))
        times = queries.shape[1] // known.shape[1]
        known, seen = (states.repeat_interleave(times, 1).transpose(0, 1) for states in (known, seen))
        scores = queries[begin:end].transpose(0, 1) @ known.transpose(1, 2) * scale
        back = torch.arange(used - (end - begin), used)[:, None] - torch.arange(used)
        hidden = (back < 0) | (back >= (window or used))
        outs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ seen).transpose(0, 1))
    return torch.cat(outs)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False,
    seqused_k=None, block_table=None,
):  # fmt: skip
    assert cu_seq_k is None and window_size[1] == 0 and enable_gqa == (query.shape[1] != key.shape[2])
    assert max_k == block_table.shape[1] * key.shape[1]
    return dense(query, key, value, Batch(block_table, cu_seq_q, seqused_k, None, max_q), scale, window_of(window_size))


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
    window_size=(-1, -1), block_table=None,
):  # fmt: skip
    assert causal
    batch = Batch(block_table, cu_seqlens_q, cu_seqlens_k.diff(), None, max_seqlen_q)
    return dense(q, k, v, batch, softmax_scale, window_of(window_size))


def flash_attn_with_kvcache(
    q, k_cache, v_cache, cache_seqlens=None, page_table=None, cu_seqlens_q=None, max_seqlen_q=None,
    softmax_scale=None, causal=False, window_size=(-1, -1),
):  # fmt: skip
    assert causal
    batch = Batch(page_table, cu_seqlens_q, cache_seqlens, None, max_seqlen_q)
    return dense(q, k_cache, v_cache, batch, softmax_scale, window_of(window_size))


def window_of(size):
    return None if size[0] == -1 else size[0] + 1


KERNELS = {
    "gathered": GATHERED,
    "torch": torch_kernel(varlen_attn),
    "flash-attn 2": flash_2_kernel(flash_attn_varlen_func),
    "flash-attn 3": flash_3_kernel(flash_attn_with_kvcache),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("news", [(3, 1, 7), (1, 1, 1)])
def test_every_signature_attends_through_the_table(name, window, news):
    torch.manual_seed(0)
    queries, keys, values = torch.randn(sum(news), 4, 8), torch.randn(9, 4, 2, 8), torch.randn(9, 4, 2, 8)
    used = torch.tensor([9, 2, 7], dtype=torch.int32)
    starts = torch.tensor([0, *np.cumsum(news)], dtype=torch.int32)
    table = torch.tensor([[7, 1, 3], [2, 0, 0], [5, 8, 0]], dtype=torch.int32)
    batch = Batch(table, starts, used, torch.tensor([0, *used.cumsum(0)]).int(), max(news))
    found = KERNELS[name].attend(queries, keys, values, batch, 0.4, window)
    torch.testing.assert_close(found, dense(queries, keys, values, batch, 0.4, window))


def test_passes_of_few_and_of_many_tokens_are_the_same(llama, images, monkeypatch):
    requests = mixed_requests(images)[:6]
    expected = [answer.token_ids for answer in paged(llama).generate(requests)]
    monkeypatch.setattr("llava.generation.attention.joined.Tables.FEW", 0)
    assert [answer.token_ids for answer in paged(llama).generate(requests)] == expected


def test_a_signature_without_pages_is_no_kernel():
    def varlen_attn_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        raise AssertionError

    assert torch_kernel(varlen_attn_2_11) is None and flash_2_kernel(varlen_attn_2_11) is None
    assert flash_3_kernel(varlen_attn_2_11) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU")
def test_kernels_that_fail_in_any_way_are_done_without(caplog):
    """A GPU that isn't there is an AssertionError of torch's, a header that Triton misses one of its own."""
    with caplog.at_level("INFO"):
        kernel = working_kernel(torch.device("cuda"), torch.float16, 4, 2, 64)
        assert working_fused(torch.device("cuda")) is None
    assert kernel is GATHERED and "no kernels of Triton here (" in caplog.text


def test_text_prompts_need_no_image(llama):
    assert paged(llama).generate([Request("Hello", id=1)])[0].finish_reason in ("stop", "length")
