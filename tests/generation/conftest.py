"""A tiny model of each kind, loaded once, and requests about a few images."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava.conversation import get_template
from llava.generation import Request, SamplingParams
from llava.model import load_pretrained_model
from tests import tiny

KINDS = {
    "llama": {"kind": "llama"},
    "mistral": {"kind": "mistral"},
    "qwen2": {"kind": "qwen2", "tie_word_embeddings": True},
    "patches": {"kind": "llama", "mm_image_token_scheme": "patch", "mm_use_im_start_end": True},
}


@pytest.fixture(scope="session", params=KINDS)
def loaded(request, tmp_path_factory):
    folder = tiny.make_llava(tmp_path_factory.mktemp(request.param), **KINDS[request.param])
    return load_pretrained_model(folder, device="cpu")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return load_pretrained_model(tiny.make_llava(tmp_path_factory.mktemp("llama")), device="cpu")


@pytest.fixture(scope="session")
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(5)]


def ask(question, images=(), template="vicuna_v1", id=None, **sampling):
    """A request with an image's placeholder before the question for each of `images`."""
    conversation = get_template(template)
    conversation.append_message(conversation.roles[0], "<image>\n" * len(images) + question)
    return Request(conversation, images, SamplingParams(**{"max_new_tokens": 12} | sampling), id)


def mixed_requests(images, count=14, **sampling):
    """Questions of many lengths about none, one or two images; several share an image, two are the same."""
    requests = [
        ask(
            "What does the picture show? " + "left right " * (index % 4),
            [images[(index // 2 + more) % len(images)] for more in range(index % 3)],
            id=index,
            **sampling,
        )
        for index in range(count - 1)
    ]
    return [*requests, requests[-1]]


@torch.inference_mode()
def answer_alone(loaded, engine, request):
    """transformers' own greedy answer: (token ids without the end mark, margin of the top two at each)."""
    prompt = engine.prompts.build(request)
    ids = torch.from_numpy(prompt.ids)[None]
    features = engine.encoder.features(prompt.images)
    # Given none, transformers would take the configuration's.
    stops = sorted(prompt.stop_ids) or [1_000_000]
    output = loaded.model.generate(
        inputs_embeds=loaded.model.embed_inputs(ids, image_features=torch.cat(features) if features else None),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=prompt.max_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0].tolist()
    top = torch.cat(output.logits).topk(2).values
    length = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:length], (top[:, 0] - top[:, 1]).tolist()


def assert_same(expected, margins, found):
    """Token by token, up to a place where rounding decides."""
    for place, (one, other) in enumerate(zip([*expected, None], [*found, None])):
        if one != other:
            assert margins[place] < 1e-4, f"token {place}: {other} instead of {one}"
            return
