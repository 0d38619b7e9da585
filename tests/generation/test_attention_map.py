"""Where the model looked: the same weights as transformers' own attention gives, put into the right patches."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import LlavaError
from llava.generation import ContextTooLong, Engine
from tests.generation.conftest import ask


@torch.inference_mode()
def attention_of_transformers(loaded, engine, request, token_ids):
    """`[tokens, positions]`, mean over heads and layers, from eager attention over the whole sequence."""
    prompt = engine.prompts.build(request)
    ids = torch.from_numpy(np.concatenate([prompt.ids, token_ids[:-1]]))[None]
    features = engine.encoder.features(prompt.images)
    embeds = loaded.model.embed_inputs(ids, image_features=torch.cat(features) if features else None)
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("eager")
    try:
        attentions = loaded.model(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions
    finally:
        loaded.model.set_attn_implementation(before)
    return torch.stack(attentions).mean((0, 2))[0, -len(token_ids) :].numpy(), prompt.spans


@pytest.mark.parametrize("count", [1, 2])
def test_the_weights_are_those_of_attention(loaded, images, count):
    engine = Engine(loaded, max_batch_size=2)
    request = ask("What does the picture show?", images[:count], ignore_eos=True)
    [answer] = engine.generate([request])
    found = engine.attention_map(request, answer.token_ids)
    expected, spans = attention_of_transformers(loaded, engine, request, answer.token_ids)
    side = loaded.model.get_vision_tower().patches_per_side
    assert [view.number for view in found.views] == list(range(count))
    for view, (first, last) in zip(found.views, spans, strict=True):
        np.testing.assert_allclose(view.weights, expected[:, first:last].reshape(-1, side, side), atol=1e-6)
    np.testing.assert_allclose(found.shares, sum(expected[:, a:b].sum(1) for a, b in spans), atol=1e-6)
    assert "".join(found.tokens) == answer.text and len(found.tokens) == len(answer.token_ids)


def test_a_view_is_the_image_as_the_tower_saw_it(llama):
    """Its left half white, its right half black, whatever the mean and deviation of the tower are."""
    engine = Engine(llama)
    source = Image.new("RGB", (60, 60))
    source.paste((255, 255, 255), (0, 0, 30, 60))
    [view] = engine.attention_map(ask("?", [source]), [5, 6]).views
    size = llama.model.get_vision_tower().image_size
    assert view.image.size == (size, size)
    pixels = np.asarray(view.image)
    assert pixels[:, : size // 4].min() > 250 and pixels[:, -size // 4 :].max() < 5


def test_what_runs_is_not_disturbed(llama, images):
    request = ask("What does the picture show?", images[:1], max_new_tokens=24, ignore_eos=True)
    expected = Engine(llama).generate([request])[0].token_ids
    engine = Engine(llama)
    with engine.submit(request) as handle:
        for number, _ in enumerate(handle):
            if number in (3, 9):
                engine.attention_map(ask("And this?", images[1:3]), expected)
    assert handle.answer.token_ids == expected


@pytest.mark.parametrize("token_ids", [[], [-1], [10**9]])
def test_ids_that_no_answer_has_are_refused(llama, token_ids):
    with pytest.raises(LlavaError, match="token_ids"):
        Engine(llama).attention_map(ask("?"), token_ids)


def test_an_answer_beyond_the_context_is_refused(llama):
    engine = Engine(llama)
    with pytest.raises(ContextTooLong):
        engine.attention_map(ask("?"), [5] * engine.context_len)
