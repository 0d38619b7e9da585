"""The multimodal forward: features in their places, batches equal singles, text-only training, generation."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.records import read_json, write_json
from tests.tiny import IMAGE_SIZE, make_llava

PATCHES = (IMAGE_SIZE // 14) ** 2
IMAGE = [-200] * PATCHES


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request, tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp(request.param), request.param, mm_projector_type="mlp2x_gelu")


@pytest.fixture
def model(folder):
    return load_pretrained_model(folder, device="cpu", dtype="float32").model


def images(count, seed=0):
    return torch.rand(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def ids(*tokens):
    return torch.tensor([list(tokens)])


def test_features_stand_where_the_placeholders_stood(model):
    pixel_values = images(3)
    input_ids = torch.tensor([[1, *IMAGE, 7, *IMAGE], [1, 5, 6, *IMAGE, 9, 9, 9, 9]][:1] + [[1, 5, *IMAGE, 9, 9, 9, 9]])
    with torch.no_grad():
        features = model.encode_images(pixel_values)
        embeds = model.embed_inputs(input_ids, pixel_values)
    assert features.shape == (3, PATCHES, model.config.hidden_size)
    assert torch.equal(embeds[0, 1 : 1 + PATCHES], features[0])
    assert torch.equal(embeds[0, 2 + PATCHES :], features[1])
    assert torch.equal(embeds[1, 2 : 2 + PATCHES], features[2])
    words = model.get_input_embeddings()
    assert torch.equal(embeds[0, 1 + PATCHES], words.weight[7])
    assert torch.equal(embeds[1, -4:], words.weight[9].expand(4, -1))


def test_three_ways_to_give_images_are_one(model):
    input_ids, pixel_values = ids(1, *IMAGE, 7, 8), images(1)
    with torch.no_grad():
        expected = model(input_ids=input_ids, pixel_values=pixel_values).logits
        vision = model.get_vision_tower()(pixel_values)
        assert torch.equal(model(input_ids=input_ids, vision_features=vision).logits, expected)
        projected = model.encode_images(pixel_values).flatten(0, 1)
        assert torch.equal(model(input_ids=input_ids, image_features=projected).logits, expected)
    with pytest.raises(LlavaError, match="not two of them"):
        model(input_ids=input_ids, pixel_values=pixel_values, vision_features=vision)


@pytest.mark.parametrize(
    ("input_ids", "count"),
    [(ids(1, *IMAGE, 7), 0), (ids(1, *IMAGE, 7), 2), (ids(1, *IMAGE[1:], 7), 1), (ids(1, 5, 7), 1)],
)
def test_numbers_of_positions_and_features_must_agree(model, input_ids, count):
    with pytest.raises(LlavaError, match=r"\d+ image positions but the images give \d+ features"):
        model(input_ids=input_ids, pixel_values=images(count) if count else None)


def test_images_of_another_size_are_refused(model):
    with pytest.raises(
        LlavaError, match=rf"takes pixel values \[n, 3, {IMAGE_SIZE}, {IMAGE_SIZE}\], got \[1, 3, 14, 14\]"
    ):
        model.encode_images(torch.zeros(1, 3, 14, 14))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_samples(model, side):
    samples = [([1, *IMAGE, 7, 8, 9], images(1, 1)), ([1, 5], None), ([1, *IMAGE, 6, *IMAGE], images(2, 2))]
    longest = max(len(tokens) for tokens, _ in samples)
    rows, masks, spans = [], [], []
    for tokens, _ in samples:
        padding = longest - len(tokens)
        before, after = (padding, 0) if side == "left" else (0, padding)
        rows.append([0] * before + tokens + [0] * after)
        masks.append([0] * before + [1] * len(tokens) + [0] * after)
        spans.append(slice(before, before + len(tokens)))
    pixel_values = torch.cat([image for _, image in samples if image is not None])
    with torch.no_grad():
        batch = model(
            input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks), pixel_values=pixel_values
        ).logits
        for row, (tokens, image) in enumerate(samples):
            single = model(input_ids=torch.tensor([tokens]), pixel_values=image).logits[0]
            assert torch.allclose(batch[row, spans[row]], single, atol=1e-5), row


def test_packed_samples_do_not_see_each_other(model):
    first, second = [1, *IMAGE, 7, 8], [1, 9, *IMAGE, 6]
    one, two = images(1, 1), images(1, 2)
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    with torch.no_grad():
        packed = model(
            input_ids=ids(*first, *second), position_ids=positions, pixel_values=torch.cat([one, two]), use_cache=False
        ).logits
        singles = [
            model(input_ids=ids(*first), pixel_values=one).logits[0],
            model(input_ids=ids(*second), pixel_values=two).logits[0],
        ]
    assert torch.allclose(packed[0], torch.cat(singles), atol=1e-5)


def test_labels_of_images_are_ignored(model):
    input_ids, pixel_values = ids(1, *IMAGE, 7, 8, 9), images(1)
    labels = ids(-100, *[-100] * PATCHES, 7, 8, 9)
    output = model(input_ids=input_ids, labels=labels, pixel_values=pixel_values)
    scores = torch.log_softmax(output.logits[0, PATCHES:-1], dim=-1)
    assert torch.allclose(output.loss, -scores[range(3), [7, 8, 9]].mean(), atol=1e-5)


def gradients(model):
    """Which of tower, projector and language model received a gradient, and whether any isn't zero."""
    parts = {
        "tower": model.get_vision_tower(),
        "projector": model.model.mm_projector,
        "language": model.model.layers,
    }
    found = {}
    for name, part in parts.items():
        given = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        found[name] = None if not given else any(bool(grad.any()) for grad in given)
    return found


@pytest.mark.parametrize("empty", ["none", "no pixel values", "no vision features"])
def test_text_only_batch_runs_tower_and_projector_with_weight_zero(model, empty):
    model.train()
    called = []
    model.get_vision_tower().register_forward_hook(lambda *_: called.append("tower"))
    model.model.mm_projector.register_forward_hook(lambda *_: called.append("projector"))
    tower = model.get_vision_tower()
    extra = {
        "none": {},
        "no pixel values": {"pixel_values": torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE)},
        "no vision features": {"vision_features": torch.zeros(0, PATCHES, tower.hidden_size)},
    }[empty]
    labels = ids(1, 5, 6, 7)
    loss = model(input_ids=labels, labels=labels, **extra).loss
    loss.backward()
    assert called == (["projector"] if empty == "no vision features" else ["tower", "projector"])
    found = gradients(model)
    assert found["projector"] is False, "a gradient of zeros, so that sharded ranks reduce the same parameters"
    assert found["language"] is True
    assert found["tower"] == (None if empty == "no vision features" else False)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=labels, labels=labels).loss, loss)
    assert called == (["projector"] if empty == "no vision features" else ["tower", "projector"])


def test_frozen_tower_builds_no_graph(model):
    model.train()
    model.get_vision_tower().requires_grad_(False)
    assert not model.get_vision_tower()(images(1)).requires_grad
    assert model.encode_images(images(1)).requires_grad
    labels = ids(1, *IMAGE, 7, 8)
    model(input_ids=labels, labels=labels.masked_fill(labels < 0, -100), pixel_values=images(1)).loss.backward()
    assert gradients(model) == {"tower": None, "projector": True, "language": True}


def test_gradient_reaches_an_unfrozen_tower(model):
    model.train()
    model.get_vision_tower().requires_grad_(True)
    labels = ids(1, *IMAGE, 7, 8)
    model(input_ids=labels, labels=labels.masked_fill(labels < 0, -100), pixel_values=images(1)).loss.backward()
    assert gradients(model) == {"tower": True, "projector": True, "language": True}


def test_gradient_checkpointing_changes_nothing(model):
    model.train()
    labels = ids(1, *IMAGE, 7, 8)
    inputs = {"input_ids": labels, "labels": labels.masked_fill(labels < 0, -100), "pixel_values": images(1)}
    weight = model.model.mm_projector[0].weight
    model(**inputs).loss.backward()
    expected = weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**inputs).loss.backward()
    assert torch.allclose(weight.grad, expected, atol=1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_equals_steps_without_cache(model, use_cache):
    start, pixel_values = ids(1, *IMAGE, 7, 8), images(1)
    tokens = start
    with torch.no_grad():
        for _ in range(6):
            following = model(input_ids=tokens, pixel_values=pixel_values).logits[0, -1].argmax()
            tokens = torch.cat([tokens, following.view(1, 1)], dim=1)
    found = generate(model, start, pixel_values=pixel_values, use_cache=use_cache)
    assert found.tolist() == tokens.tolist()
    with torch.no_grad():
        features = model.encode_images(pixel_values).flatten(0, 1)
    assert generate(model, start, image_features=features, use_cache=use_cache).tolist() == tokens.tolist()


def test_generate_in_left_padded_batches_equals_singles(model):
    first, second = [1, *IMAGE, 7, 8, 9, 10], [1, *IMAGE, 5]
    pixel_values = images(2)
    padding = len(first) - len(second)
    batch = torch.tensor([first, [0] * padding + second])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    together = generate(model, batch, attention_mask=mask, pixel_values=pixel_values)
    for row, tokens in enumerate((first, second)):
        alone = generate(model, ids(*tokens), pixel_values=pixel_values[row : row + 1])
        assert together[row, len(first) :].tolist() == alone[0, len(tokens) :].tolist()


def test_several_beams_share_the_images_of_their_sample(model):
    inputs = torch.tensor([[1, *IMAGE, 7], [1, *IMAGE, 8]])
    pixel_values = images(2)
    together = generate(model, inputs, pixel_values=pixel_values, num_beams=3)
    for row in range(2):
        alone = generate(model, inputs[row : row + 1], pixel_values=pixel_values[row : row + 1], num_beams=3)
        assert together[row].tolist() == alone[0].tolist()


def generate(model, input_ids, **kwargs):
    model.generation_config.eos_token_id = None
    kwargs = {"attention_mask": torch.ones_like(input_ids)} | kwargs
    return model.generate(input_ids=input_ids, do_sample=False, max_new_tokens=6, pad_token_id=0, **kwargs)


def test_whole_forward_compiles_without_a_graph_break(model):
    """No shape of the scatter depends on the data: one graph serves other ids and other images."""
    embed = torch.compile(model.embed_inputs, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for seed, input_ids in ((1, ids(1, *IMAGE, 7, 8, 9)), (2, ids(1, 5, 6, *IMAGE, 7))):
            pixel_values = images(1, seed)
            assert torch.equal(embed(input_ids, pixel_values), model.embed_inputs(input_ids, pixel_values))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_is_known_to_transformers(folder, model):
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model)
    input_ids, pixel_values = ids(1, *IMAGE, 7), images(1)
    with torch.no_grad():
        assert torch.equal(
            again(input_ids=input_ids, pixel_values=pixel_values).logits,
            model(input_ids=input_ids, pixel_values=pixel_values).logits,
        )


def test_a_checkpoint_whose_grid_is_endless_is_refused_when_it_is_loaded(tmp_path):
    folder = make_llava(tmp_path / "tiny", image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56], [56, 28]])
    load_pretrained_model(folder, device="cpu")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"image_grid_pinpoints": [[10**6, 10**6]]})
    with pytest.raises(LlavaError, match="image_grid_pinpoints: 1000000 × 1000000"):
        load_pretrained_model(folder, device="cpu")
