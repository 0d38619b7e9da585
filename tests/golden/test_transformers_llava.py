"""Golden numbers that need no outside files: transformers' own LlavaForConditionalGeneration, made here at random.

Its logits and greedy ids are the target: of the folder that it saved, of that folder imported, and of the import
exported again.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.generation import Engine, Request, SamplingParams
from llava.model import load_pretrained_model
from llava.model.convert.hf_reader import import_hf
from llava.model.convert.hf_writer import export_hf
from tests import tiny

KINDS = {
    "llama": {"projector_hidden_act": "gelu"},
    "mistral": {"projector_hidden_act": "gelu", "sliding_window": None},
    "qwen2": {"projector_hidden_act": "gelu"},
    "llama_cls": {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "full"},
}
NEW = 16
PATCHES = (tiny.IMAGE_SIZE // tiny.PATCH_SIZE) ** 2


@pytest.fixture(scope="module", params=KINDS)
def library(request, tmp_path_factory) -> SimpleNamespace:
    """The library's model with random weights, its folder, and its ids and pixel values of a few prompts."""
    fields = dict(KINDS[request.param])
    kind = request.param.split("_")[0]
    root = tmp_path_factory.mktemp(request.param)
    llm = tiny.make_llm(root / "llm", kind)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens("<image>", special_tokens=True)
    text = AutoConfig.from_pretrained(llm).to_dict() | {"vocab_size": -(-len(tokenizer) // 64) * 64}
    if "sliding_window" in fields:
        text["sliding_window"] = fields.pop("sliding_window")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=tiny.IMAGE_SIZE,
        patch_size=tiny.PATCH_SIZE,
        projection_dim=16,
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(5)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id, **fields)
    model = LlavaForConditionalGeneration(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # wide enough that the next token is decided by more than rounding
            torch.nn.init.normal_(parameter, std=0.1)
    # As in released models: what was added for <image>, and to round the rows up, is never the likeliest.
    model.lm_head.weight.data[image_id:] = 0
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    folder = root / "library"
    model.save_pretrained(folder)
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": tiny.IMAGE_SIZE}, crop_size=size),
        tokenizer,
        patch_size=tiny.PATCH_SIZE,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    per_image = PATCHES + (config.vision_feature_select_strategy == "full")
    return SimpleNamespace(model=model, folder=folder, tokenizer=tokenizer, image_id=image_id, per_image=per_image)


@pytest.fixture(scope="module", params=["as saved", "imported"])
def ours(request, library):
    """The same weights, loaded here: from the library's folder, and from its import."""
    folder = library.folder
    if request.param == "imported":
        folder = import_hf(folder, folder.parent / "imported") if not (folder.parent / "imported").exists() else None
    return load_pretrained_model(folder or library.folder.parent / "imported", device="cpu")


def prompts(library) -> list[tuple[list[int], int]]:
    """(ids with one IMAGE_TOKEN_INDEX per image, number of images)."""
    encode = library.tokenizer
    first, more = encode("USER: ").input_ids, encode("Is there a fracture? ASSISTANT:").input_ids
    return [
        (first + more, 0),
        ([*first, IMAGE_TOKEN_INDEX, *more], 1),
        ([*first, IMAGE_TOKEN_INDEX, *more, IMAGE_TOKEN_INDEX, *first], 2),
    ]


def pixel_values(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def expanded(library, ids: list[int], image_id: int) -> torch.Tensor:
    repeats = [library.per_image if token == IMAGE_TOKEN_INDEX else 1 for token in ids]
    tokens = [image_id if token == IMAGE_TOKEN_INDEX else token for token in ids]
    return torch.repeat_interleave(torch.tensor(tokens), torch.tensor(repeats))[None]


def library_inputs(library, ids: list[int], count: int) -> dict[str, torch.Tensor]:
    given = {"input_ids": expanded(library, ids, library.image_id)}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    return given | ({"pixel_values": pixel_values(count)} if count else {})


def test_logits(library, ours):
    for ids, count in prompts(library):
        with torch.no_grad():
            theirs = library.model(**library_inputs(library, ids, count)).logits
            own = ours.model(
                input_ids=expanded(library, ids, IMAGE_TOKEN_INDEX), pixel_values=pixel_values(count) if count else None
            ).logits
        rows = min(theirs.shape[-1], own.shape[-1])
        assert rows >= len(library.tokenizer) - 1 and theirs.shape[1] == own.shape[1]
        assert (theirs[..., :rows] - own[..., :rows]).abs().max() < 1e-4


def test_greedy_ids_of_the_engine(library, ours):
    engine = Engine(ours)
    for ids, count in prompts(library):
        given = library_inputs(library, ids, count)
        with torch.no_grad():
            whole = library.model.generate(**given, do_sample=False, max_new_tokens=NEW)
        expected = whole[0, given["input_ids"].shape[1] :].tolist()
        end = library.tokenizer.eos_token_id
        expected = expected[: expected.index(end)] if end in expected else expected
        images = list(pixel_values(count).numpy())
        (answer,) = engine.generate([Request(ids, images, SamplingParams(max_new_tokens=NEW))])
        assert answer.token_ids == expected and len(set(expected)) > 1


def test_pixel_values_of_the_processor(library, ours):
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    theirs = CLIPImageProcessor.from_pretrained(library.folder)(Image.fromarray(pixels), return_tensors="np")
    found = ours.image_processor(Image.fromarray(pixels), ours.model.config.image_aspect_ratio)
    assert np.abs(found - theirs["pixel_values"]).max() < 1e-5


def test_export_gives_the_library_back_its_numbers(library, tmp_path: Path):
    native = import_hf(library.folder, tmp_path / "native")
    again = LlavaForConditionalGeneration.from_pretrained(export_hf(native, tmp_path / "again"), dtype=torch.float32)
    for ids, count in prompts(library):
        given = library_inputs(library, ids, count)
        moved = given | {"input_ids": expanded(library, ids, again.config.image_token_id)}
        with torch.no_grad():
            before, after = library.model(**given).logits, again.eval()(**moved).logits
        rows = len(library.tokenizer) - 1
        assert (before[..., :rows] - after[..., :rows]).abs().max() < 1e-4
