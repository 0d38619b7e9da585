"""Packed passes, the cache's rows, and prefixes found again."""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.generation import Engine
from llava.generation.cache.prefix_store import BLOCK, PrefixStore, common_length
from llava.generation.cache.rows import GrowingRowCache, RowCache, gives_addresses
from llava.generation.forward_pass import Row, copies_in_order, split_into_groups
from tests.generation.conftest import ask, mixed_requests

HEADS, SIZE = 2, 4


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=7))
def test_groups_cost_least(lengths):
    lengths = sorted(lengths, reverse=True)

    def cost(groups):
        return sum(64 + max(lengths[start:end]) * (end - start) for start, end in groups)

    found = split_into_groups(lengths)
    assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])] and found[-1][1] == len(lengths)
    places = range(1, len(lengths))
    # The same cost per row: runs of equal lengths are never divided by ours.
    every = (
        list(itertools.pairwise([0, *cuts, len(lengths)]))
        for count in range(len(lengths))
        for cuts in itertools.combinations(places, count)
    )
    assert cost(found) == min(map(cost, every))


def test_copies_come_in_order_of_dependence():
    rows = [Row(3, 0, 9), Row(4, 5, 9, source=3), Row(5, 7, 9, source=4), Row(6, 5, 8, source=3)]
    assert copies_in_order(rows) == [([3, 3], [4, 6], 5), ([4], [5], 7)]


@pytest.mark.parametrize("kind", [RowCache, GrowingRowCache])
def test_rows_are_written_moved_grown_and_kept(kind):
    cache = kind(1, 1, 10**9, 8, 512)
    cache.prepare([10, 10], 0)
    values = torch.randn(3, HEADS, SIZE)
    cache.write(0, torch.tensor([1, 1, 1]), torch.tensor([0, 1, 2]), values, -values)
    saved = cache.save(1, 3)
    assert torch.equal(saved[0][0], values.transpose(0, 1)) and torch.equal(saved[0][1], -saved[0][0])
    cache.move([1], [0], 3)
    cache.prepare([100] * 5, 1)
    shape = (2, 8, HEADS, 512, SIZE) if kind is RowCache else (2, 5, HEADS, 128, SIZE)
    assert cache.layers[0].shape == shape
    assert torch.equal(cache.save(0, 3)[0], saved[0])
    cache.load(3, 2, saved, 2)
    assert torch.equal(cache.save(4, 2)[0], saved[0][:, :, :2])
    cache.release()
    assert cache.layers == [None]
    assert not cache.holds([1] * 9) and not cache.holds([513]) and cache.holds([512] * 8)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_take_the_memory_that_is_written():
    heads, size = 8, 64
    position = 2 * heads * size * 4
    cache = RowCache(1, position, 2048 * position, 64, 10**6)  # 260 GB of addresses
    one = torch.ones(2048, heads, size)
    before = resident_bytes()
    cache.prepare([2048], 0)
    cache.write(0, torch.zeros(2048, dtype=torch.int64), torch.arange(2048), one, one)
    assert cache.layers[0].nbytes == 64 * 10**6 * position
    assert 0.9 < (resident_bytes() - before) / (2048 * position) < 1.5
    assert cache.holds([1024, 1024]) and cache.holds([64] * 32) and not cache.holds([1024, 1025])
    # The first row's end belongs to nobody; it is given back when others need the memory.
    place = cache.layers[0].data_ptr()
    cache.prepare([64], 1)
    assert cache.layers[0].data_ptr() == place
    cache.prepare([64] * 32, 1)
    assert cache.layers[0].data_ptr() != place and resident_bytes() - before < 0.5 * 2048 * position
    assert bool((cache.layers[0][:, 0, :, :64] == 1).all()) and not cache.layers[0][:, 0, :, 64:2048].any()
    # Alone, a row goes beyond the limit, and isn't copied at each step.
    cache.prepare([3000], 1)
    place = cache.layers[0].data_ptr()
    cache.prepare([3100], 1)
    assert cache.layers[0].data_ptr() == place


def test_where_addresses_count_as_memory_rows_grow(llama, monkeypatch):
    assert not gives_addresses(1 << 62)
    requests = [ask(f"What is {n}?", max_new_tokens=80, ignore_eos=True) for n in range(3)]
    expected = [answer.token_ids for answer in Engine(llama).generate(requests)]
    monkeypatch.setattr("llava.generation.runner.gives_addresses", lambda size: False)
    engine = Engine(llama)
    assert type(engine.scheduler.runner.cache) is GrowingRowCache
    assert [answer.token_ids for answer in engine.generate(requests)] == expected


def test_memory_of_growing_rows_is_bounded():
    cache = GrowingRowCache(1, 2, 2 * 64 * 10, 20, 600)
    assert cache.holds([64] * 10) and not cache.holds([64] * 11) and not cache.holds([65, *[1] * 9])
    assert not cache.holds([601])
    cache.prepare([64] * 10, 0)
    cache.write(0, torch.tensor([0]), torch.tensor([0]), torch.ones(1, HEADS, SIZE), torch.ones(1, HEADS, SIZE))
    cache.prepare([64, 300], 1)  # wider only if there are fewer
    assert cache.layers[0].shape == (2, 2, HEADS, 320, SIZE)
    assert bool((cache.layers[0][:, 0, :, 0] == 1).all())


def states(length):
    return [torch.zeros(2, HEADS, length, SIZE)]


def test_longest_beginning_is_found():
    store = PrefixStore(10**9)
    one, other = np.arange(100), np.concatenate([np.arange(50), np.arange(1000, 1050)])
    first, second = store.add(one, states(100)), store.add(other, states(100))
    assert store.find(np.arange(80)) == (first, 80)
    assert store.find(np.concatenate([other[:70], [7] * 9])) == (second, 70)
    assert store.find(np.arange(5, 80)) == (None, 0)
    assert store.find(np.arange(BLOCK - 1)) == (None, 0)
    prefix, length = store.find(np.concatenate([np.arange(45), [9] * 40]))
    assert length == 45 and prefix in (first, second)


def test_oldest_prefixes_go_first():
    size = 2 * HEADS * 32 * SIZE * 4
    store = PrefixStore(2 * size)
    keys = [np.arange(32) + 100 * index for index in range(3)]
    first, second = (store.add(key, states(32)) for key in keys[:2])
    assert store.find(keys[0])[0] is first  # used again, so the other is older now
    store.add(keys[2], states(32))
    assert store.find(keys[1]) == (None, 0) and store.find(keys[0])[0] is first
    assert store.num_bytes == 2 * size and len(store) == 2
    store.add(np.arange(500, 600), states(100))  # more than there is room for
    assert len(store) == 2
    assert second.key is not None


@pytest.mark.parametrize("shared", [16, 32, 38])
def test_no_prefix_is_kept_twice(shared):
    """The same prompts again, and what goes on from them: one entry per prompt at the end."""
    store = PrefixStore(10**9)
    prompts = [np.concatenate([np.arange(shared), np.arange(80 - shared) + 100 * number]) for number in range(1, 21)]
    for length in (42, 42, 42, 60, 80, 80):
        for prompt in prompts:
            store.add(prompt[:length], states(length))
            assert store.holds(prompt[:length])
        assert len(store) == len(prompts)
    assert store.num_bytes == sum(state.numel() * 4 for state in states(80)) * len(prompts)
    assert all(store.find(prompt) == (store.find(prompt)[0], 80) for prompt in prompts)
    store.clear()
    assert not store.holds(prompts[0]) and not store._ends and not store._index


def test_an_engine_keeps_a_prompt_once(llama, images):
    """The worker's memory levels: what was answered again takes no more of it."""
    engine = Engine(llama)
    requests = mixed_requests(images)[:6]
    counts = []
    for _ in range(3):
        for request in requests:
            with engine.submit(request) as handle:
                list(handle)
        counts.append((len(engine.scheduler.prefixes), engine.scheduler.prefixes.num_bytes))
    assert counts[0] == counts[1] == counts[2] and counts[0][0] <= len(requests)


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_common_length(one, other):
    expected = next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    assert common_length(np.array(one, np.int64), np.array(other, np.int64)) == expected


@pytest.mark.parametrize("size", [1, 7])
def test_hidden_states_are_transformers_own(llama, images, size):
    """Rows of several lengths, one of them begun before, one copied from another: the same hidden states."""
    engine = Engine(llama)
    prompts = [engine.prompts.build(request) for request in mixed_requests(images)[:size]]
    runner = engine.scheduler.runner
    prompts.sort(key=len, reverse=True)
    with torch.inference_mode():
        runner.cache.prepare([512] * size, 0)
        begun = 10
        runner.run([Row(size - 1, 0, begun)], [], prompts[-1:])
        rows = [Row(row, 0, len(prompt)) for row, prompt in enumerate(prompts[:-1])]
        found = runner.run([*rows, Row(size - 1, begun, len(prompts[-1]))], [], prompts)
        for prompt, hidden in zip(prompts, found):
            features = engine.encoder.features(prompt.images)
            embeds = llama.model.embed_inputs(
                torch.from_numpy(prompt.ids)[None], image_features=torch.cat(features) if features else None
            )
            expected = llama.model.get_model()(inputs_embeds=embeds).last_hidden_state[0, -1]
            torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
