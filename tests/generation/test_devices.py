"""A model whose layers are on several devices: what a layer reads is brought to its device."""

import pytest
import torch

from llava.generation import Engine
from llava.generation.forward_pass import Row
from llava.model import load_pretrained_model
from tests import tiny
from tests.generation.conftest import ask, mixed_requests
from tests.generation.placed import Placed, Placing, place

PLACES = [torch.device("meta", index) for index in range(2)]


@pytest.fixture
def fresh(tmp_path):
    """Models of their own: the tests move them."""
    folder = tiny.make_llava(tmp_path, kind="llama")
    return lambda: load_pretrained_model(folder, device="cpu")


def test_the_upper_half_on_meta_reaches_logits(fresh, images):
    loaded = fresh()
    core = loaded.model.get_model()
    half = len(core.layers) // 2
    for part in (*core.layers[half:], core.norm, loaded.model.lm_head):
        part.to("meta")
    assert half and {one.device.type for one in core.layers[:half].parameters()} == {"cpu"}
    engine = Engine(loaded, cache_bytes=1 << 26)
    prompts = [engine.prompts.build(request) for request in mixed_requests(images)[:3]]
    runner = engine.scheduler.runner
    runner.cache.prepare([512] * 4, 0)
    with torch.inference_mode():
        rows = [Row(row, 0, len(prompt)) for row, prompt in enumerate(prompts)]
        logits = runner.logits(runner.run(rows, [], prompts))
        assert logits.is_meta and logits.shape == (3, loaded.model.config.vocab_size)
        more = runner.run([Row(row, len(prompt), len(prompt) + 1) for row, prompt in enumerate(prompts)], [5, 6, 7], [])
    assert more.is_meta and len(more) == 3


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2}])
def test_whole_requests_over_two_devices(fresh, images, sampling, paged):
    """Every operator refuses tensors of two devices; the tokens are those of one device."""
    requests = [*mixed_requests(images, 5, **sampling), ask("And alone?", logprobs=2, **sampling)]
    expected = [answer.token_ids for answer in Engine(fresh(), cache_bytes=1 << 26).generate(requests)]
    loaded = fresh()
    core = loaded.model.get_model()
    with Placing():
        for part in (*core.layers[len(core.layers) // 2 :], core.norm, loaded.model.lm_head):
            place(part, PLACES[1])
        place(loaded.model, PLACES[0])
        engine = Engine(loaded, cache_bytes=1 << 26, paged=paged)
        found = [answer.token_ids for answer in engine.generate(requests)]
        weights = engine.attention_map(requests[0], found[0])
    assert found == expected
    assert {layer.device for layer in engine.scheduler.runner.cache.layers} == set(PLACES)
    assert weights.shares.shape == (len(found[0]),)


def test_a_step_on_one_device_reads_nothing_of_the_host(fresh, images):
    """Pages, joined layers and decoding from the device: no operator mixes in a tensor that wasn't brought there."""
    requests = mixed_requests(images, 5)
    expected = [answer.token_ids for answer in Engine(fresh(), cache_bytes=1 << 26).generate(requests)]
    loaded = fresh()
    with Placing():
        place(loaded.model, PLACES[0])
        engine = Engine(loaded, cache_bytes=1 << 26, paged=True)
        assert engine.scheduler.runner.decoder is not None
        assert [answer.token_ids for answer in engine.generate(requests)] == expected


def test_the_double_refuses_what_was_not_moved():
    with Placing():
        here, there = (Placed(torch.ones(2), device) for device in PLACES)
        with pytest.raises(AssertionError, match=r"meta:0.*meta:1"):
            here + there
        with pytest.raises(AssertionError, match=r"cpu.*meta:0"):
            here[torch.tensor([0])]
        assert (here.to(PLACES[1]) + there).device == PLACES[1]
        assert (here + 1).cpu().tolist() == [2.0, 2.0]
