"""LLaVA's Python names, used the way that its tools use them: each answer is the engine's for the same prompt."""

import argparse
import base64
import io
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

import llava.conversation as conversation_lib
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.errors import LlavaError
from llava.eval.run_llava import eval_model
from llava.generation import Engine, Request, SamplingParams
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    expand2square,
    get_model_name_from_path,
    load_image_from_base64,
    process_anyres_image,
    process_images,
    select_best_resolution,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.utils import build_logger, disable_torch_init
from tests import tiny

TEMPLATE = "vicuna_v1"
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llava(tmp_path_factory.mktemp("drop_in"))


@pytest.fixture(scope="module")
def loaded(folder):
    disable_torch_init()
    name = get_model_name_from_path(str(folder))
    return load_pretrained_model(
        str(folder), None, name, device_map="auto", multimodal=True, attn_implementation="sdpa"
    )


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50 + n, 3), dtype=np.uint8)) for n in range(4)]


def prompt_of(question, count=0):
    conv = conv_templates[TEMPLATE].copy()
    conv.append_message(conv.roles[0], "\n".join([DEFAULT_IMAGE_TOKEN] * count + [question]))
    conv.append_message(conv.roles[1], None)
    return conv.get_prompt()


def engine_ids(loaded, prompt, images):
    request = Request(prompt, images, SamplingParams(max_new_tokens=NEW))
    return Engine(loaded).generate([request])[0].token_ids


def new_ids(row, tokenizer):
    """A row of `generate` up to its end mark."""
    tokens = row.tolist()
    return tokens[: tokens.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in tokens else tokens


def test_the_loop_of_a_notebook(loaded, images):
    tokenizer, model, image_processor, context_len = loaded
    assert context_len == model.config.max_position_embeddings
    prompt = prompt_of("What does the picture show?", 1)
    input_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
    assert (input_ids == IMAGE_TOKEN_INDEX).sum() == 1 and (input_ids == tokenizer.bos_token_id).sum() == 1
    assert input_ids.tolist()[0] == tokenizer_image_token(prompt, tokenizer)
    pixels = process_images(images[:1], image_processor, model.config)
    assert pixels.shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            images=pixels.half(),
            image_sizes=[images[0].size],
            do_sample=False,
            temperature=0,
            top_p=None,
            num_beams=1,
            max_new_tokens=NEW,
            use_cache=True,
        )
    # Half-precision pixel values are a little other ones: the engine is given those.
    assert new_ids(output[0], tokenizer) == engine_ids(loaded, prompt, [pixels[0].half().float().numpy()])


def test_a_left_padded_batch_with_other_numbers_of_images(loaded, images):
    tokenizer, model, image_processor, _ = loaded
    prompts = [prompt_of("Yes?", 1), prompt_of("Is there a nodule in the left lung?", 0), prompt_of("Which?", 2)]
    rows = [tokenizer_image_token(prompt, tokenizer, return_tensors="pt") for prompt in prompts]
    pad = 2  # the end mark, as tools take it where there is no padding token
    ids = torch.nn.utils.rnn.pad_sequence([row.flip(0) for row in rows], batch_first=True, padding_value=pad).flip(1)
    expected = [
        engine_ids(loaded, prompt, own) for prompt, own in zip(prompts, [images[:1], [], images[1:3]], strict=True)
    ]
    given = {
        "attention_mask": ids.ne(pad),
        "pad_token_id": pad,
        "do_sample": False,
        "max_new_tokens": NEW,
    }
    pixels = process_images(images[:3], image_processor, argparse.Namespace(image_aspect_ratio=None))
    together = model.generate(ids, images=list(pixels), **given)
    assert [new_ids(row, tokenizer) for row in together] == expected
    # LLaVA's own batches carry an image for a row without one.
    dummy = torch.stack([pixels[0], torch.zeros_like(pixels[0]), *pixels[1:]])
    assert torch.equal(model.generate(input_ids=ids, images=dummy, **given), together)
    with pytest.raises(LlavaError, match=r"3 places for images .* for 2 images"):
        model.generate(ids, images=pixels[:2], **given)


def test_text_alone(loaded):
    tokenizer, model, _, _ = loaded
    prompt = prompt_of("Is there a fracture?")
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    output = model.generate(ids, images=None, do_sample=False, temperature=0, max_new_tokens=NEW)
    assert new_ids(output[0], tokenizer) == engine_ids(loaded, prompt, [])
    # Without `images` it is the library's call, which gives the prompt back too.
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    assert whole[0, : ids.shape[1]].tolist() == ids[0].tolist()
    assert new_ids(whole[0, ids.shape[1] :], tokenizer) == new_ids(output[0], tokenizer)


def test_a_typed_padding_token_hides_nothing(loaded):
    tokenizer, model, _, _ = loaded
    prompt = prompt_of("Is <unk> a token?")
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    unk = tokenizer.unk_token_id
    assert unk in ids
    output = model.generate(ids, images=None, attention_mask=ids.ne(unk), do_sample=False, max_new_tokens=NEW)
    assert new_ids(output[0], tokenizer) == engine_ids(loaded, prompt, [])


def test_keywords_end_an_answer(loaded):
    tokenizer, model, _, _ = loaded
    ids = tokenizer_image_token(prompt_of("Is there a fracture?"), tokenizer, return_tensors="pt")[None]
    given = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}
    free = model.generate(ids, images=None, **given)[0]
    keyword = tokenizer.decode(free[3:6])
    criteria = KeywordsStoppingCriteria([keyword], tokenizer, ids)
    stopped = model.generate(ids, images=None, stopping_criteria=[criteria], **given)[0]
    assert len(stopped) < len(free) and free[: len(stopped)].tolist() == stopped.tolist()
    assert keyword in tokenizer.decode(stopped) and keyword not in tokenizer.decode(stopped[:-1])
    # Of a prompt that comes back with the answer nothing is looked at.
    asked = KeywordsStoppingCriteria(["fracture"], tokenizer, ids)
    assert not asked(ids, None).any()
    assert asked(torch.cat([ids, ids], 1), None).tolist() == [True]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_logits_and_loss_of_an_answer(loaded, images, count):
    """lmms-eval's likelihood of an answer: labels as long as the ids, -100 before the answer."""
    tokenizer, model, image_processor, _ = loaded
    pixels = process_images(images[:count], image_processor, model.config) if count else None
    start = tokenizer_image_token(prompt_of("Which side?", count), tokenizer, return_tensors="pt")[None]
    ids = torch.cat([start, torch.tensor([tokenizer("left", add_special_tokens=False).input_ids])], 1)
    labels = ids.clone()
    labels[0, : start.shape[1]] = -100
    with torch.inference_mode():
        outputs = model(input_ids=ids, labels=labels, images=pixels, use_cache=True, image_sizes=None)
    extra = count * (model.num_patches - 1)
    assert outputs["logits"].shape[1] == ids.shape[1] + extra
    new = ids.shape[1] - start.shape[1]
    logits = outputs["logits"][0, -new - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits.float(), ids[0, -new:])
    torch.testing.assert_close(outputs["loss"], expected)


def test_the_step_before_the_language_model(loaded, images):
    tokenizer, model, image_processor, _ = loaded
    pixels = process_images(images[:2], image_processor, model.config)
    rows = [
        tokenizer_image_token(prompt_of(text, 1), tokenizer, return_tensors="pt") for text in ("Yes?", "Which one?")
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    labels = ids.clone()
    none, positions, new_mask, past, embeds, new_labels = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, labels, pixels, image_sizes=None
    )
    assert none is None and positions is None and past is None and new_mask.dtype == torch.bool
    assert embeds.shape[:2] == new_mask.shape == new_labels.shape == (2, ids.shape[1] + model.num_patches - 1)
    assert (new_labels[0] == -100).sum() >= model.num_patches and (new_labels == IMAGE_TOKEN_INDEX).sum() == 0
    with torch.inference_mode():
        whole = model(input_ids=ids, attention_mask=mask, images=pixels).logits
        apart = model(inputs_embeds=embeds, attention_mask=new_mask).logits
    torch.testing.assert_close(whole[new_mask], apart[new_mask])
    same = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, labels, None)
    assert same[0] is ids and same[4] is None


@pytest.mark.parametrize(
    "device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), "cuda:0", "auto", None], ids=lambda value: str(value)
)
def test_device_maps_of_tools(folder, device_map):
    if torch.cuda.is_available():
        pytest.skip("what is tested is the way out where there is no GPU")
    loaded = load_pretrained_model(folder, None, "anything", device_map=device_map, torch_dtype=torch.float16)
    assert loaded.model.device.type == "cpu" and loaded.model.dtype == torch.float16


def test_a_config_in_place_of_the_checkpoints(folder, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llava", "image_aspect_ratio": "pad", "hidden_size": 1}))
    model = load_pretrained_model(folder, customized_config=str(path)).model
    assert model.config.image_aspect_ratio == "pad" and model.config.hidden_size != 1
    path.write_text(json.dumps({"mm_made_up": 1}))
    with pytest.raises(LlavaError, match="no field mm_made_up"):
        load_pretrained_model(folder, customized_config=str(path))


def test_the_tower_of_a_model_and_alone(loaded, images, folder):
    model = loaded.model
    tower = model.get_vision_tower()
    assert tower.is_loaded and tower.hidden_size == model.config.mm_hidden_size and tower.num_patches == 4
    tower.load_model()
    assert tower.image_processor is loaded.image_processor and model.get_model() is model.model
    pixels = tower.image_processor.preprocess(images[0], return_tensors="pt")["pixel_values"]
    features = model.encode_images(pixels)
    assert features.shape == (1, 4, model.config.hidden_size)
    alone = build_vision_tower(argparse.Namespace(mm_vision_tower=str(folder.parent / "clip")), delay_load=True)
    torch.testing.assert_close(alone(pixels), tower(pixels))
    assert alone.image_processor.size == tower.image_processor.size
    projector = build_vision_projector(model.config)
    projector.load_state_dict(model.get_model().mm_projector.state_dict())
    torch.testing.assert_close(projector(alone(pixels)), features)
    with pytest.raises(LlavaError, match="names no vision tower"):
        build_vision_tower(argparse.Namespace())


def test_images_of_every_shape(loaded, images):
    processor = loaded.image_processor
    size = tiny.IMAGE_SIZE
    for ratio, shape in ((None, (2, 3, size, size)), ("pad", (2, 3, size, size))):
        assert process_images(images[:2], processor, argparse.Namespace(image_aspect_ratio=ratio)).shape == shape
    padded = expand2square(images[0], tuple(int(mean * 255) for mean in processor.image_mean))
    assert padded.size == (50, 50) and np.array_equal(np.asarray(padded)[5:45], np.asarray(images[0]))
    square = process_images([padded], processor, argparse.Namespace())
    assert torch.equal(square, process_images(images[:1], processor, argparse.Namespace(image_aspect_ratio="pad")))
    grid = [[size, 2 * size], [2 * size, size]]
    config = argparse.Namespace(image_aspect_ratio="anyres", image_grid_pinpoints=grid)
    tiles = process_images(images[:1], processor, config)
    assert isinstance(tiles, list) and tiles[0].shape == (3, 3, size, size)
    assert torch.equal(tiles[0], process_anyres_image(images[0], processor, str(grid)))
    assert select_best_resolution((100, 200), [(336, 672), (672, 336)]) == (336, 672)


def test_a_processor_of_the_library(loaded, images):
    from transformers import CLIPImageProcessor

    own = loaded.image_processor
    theirs = CLIPImageProcessor(size={"shortest_edge": own.size}, crop_size=own.crop_size[0])
    assert torch.equal(process_images(images, theirs, None), process_images(images, own, None))


def test_anyres_in_a_batch(loaded, images):
    tokenizer, model, image_processor, _ = loaded
    size = tiny.IMAGE_SIZE
    grid = argparse.Namespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[size, 2 * size], [2 * size, size]])
    tiles = process_images(images[:1], image_processor, grid)
    prompt = prompt_of("Which?", 1)
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    as_list = model.generate(ids, images=tiles, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(as_list, model.generate(ids, images=tiles[0][None], do_sample=False, max_new_tokens=NEW))
    assert not torch.equal(as_list, model.generate(ids, images=tiles[0][:1], do_sample=False, max_new_tokens=NEW))


def test_names_and_uploads(images):
    assert get_model_name_from_path("/models/llava-med/") == "llava-med"
    assert get_model_name_from_path("runs/vqa/checkpoint-40") == "vqa_checkpoint-40"
    buffer = io.BytesIO()
    images[0].save(buffer, "PNG")
    opened = load_image_from_base64(base64.b64encode(buffer.getvalue()).decode())
    assert np.array_equal(np.asarray(opened), np.asarray(images[0]))


@pytest.mark.parametrize("query", ["What is shown?", f"{IMAGE_PLACEHOLDER}\nWhat is shown?"])
def test_the_quick_start(folder, loaded, images, tmp_path, capsys, query):
    images[0].save(tmp_path / "scan.png")
    args = type(
        "Args",
        (),
        {
            "model_path": str(folder),
            "model_base": None,
            "model_name": get_model_name_from_path(str(folder)),
            "query": query,
            "conv_mode": None,
            "image_file": str(tmp_path / "scan.png"),
            "sep": ",",
            "temperature": 0,
            "top_p": None,
            "num_beams": 1,
            "max_new_tokens": NEW,
        },
    )()
    eval_model(args)
    request = Request(prompt_of("What is shown?", 1), [tmp_path / "scan.png"], SamplingParams(max_new_tokens=NEW))
    conversation = conv_templates[loaded.model.config.conversation_template].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat is shown?")
    answer = Engine(loaded).generate([Request(conversation, request.images, request.sampling)])[0]
    assert capsys.readouterr().out.strip() == answer.text.strip()


def test_conversations_of_scripts():
    conv = conversation_lib.default_conversation.copy()
    assert isinstance(conv, Conversation) and conv.sep_style is SeparatorStyle.TWO and conv.version == "v1"
    conv.append_message(conv.roles[0], "Hi")
    conv.append_message(conv.roles[1], None)
    assert conv.messages[-1][1] is None and conv.get_prompt().endswith("USER: Hi ASSISTANT:")
    assert (conv.sep, conv.sep2) == (" ", "</s>") and conv.system in conv.get_prompt()
    assert not conversation_lib.default_conversation.messages


def test_classes_are_known_to_the_library(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM

    assert isinstance(AutoConfig.from_pretrained(folder), LlavaConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), LlavaLlamaForCausalLM)
    assert LlavaMistralForCausalLM.config_class is LlavaMistralConfig


def test_a_logger_of_llava(tmp_path, monkeypatch):
    monkeypatch.setattr("llava.utils.LOGDIR", str(tmp_path))
    logger = build_logger("llava-test-log", "worker.log")
    logger.info("a line")
    assert build_logger("llava-test-log", "worker.log") is logger and len(logger.handlers) == 2
    assert "a line" in (tmp_path / "worker.log").read_text()
    logging.getLogger("llava-test-log").handlers.clear()


def test_names_of_the_training_script(loaded):
    from llava.train import train

    tokenizer = loaded.tokenizer
    turns = [{"from": "human", "value": "Which side? <image>"}, {"from": "gpt", "value": "left"}]
    data = argparse.Namespace(is_multimodal=True, mm_use_im_start_end=False)
    sources = train.preprocess_multimodal([turns], data)
    assert sources[0][0]["value"] == "<image>\nWhich side?"
    sample = train.preprocess(sources, tokenizer, has_image=True)
    (ids,), (labels,) = sample["input_ids"], sample["labels"]
    assert (ids == IMAGE_TOKEN_INDEX).sum() == 1 and ids.shape == labels.shape
    assert tokenizer.decode(labels[labels != -100]).strip() == "left</s>"
    for name in ("ModelArguments", "DataArguments", "TrainingArguments"):
        assert isinstance(getattr(train, name), type)
    for name in ("LazySupervisedDataset", "DataCollatorForSupervisedDataset"):
        with pytest.raises(LlavaError, match=rf"{name} doesn't exist here; use llava\.train\.data"):
            getattr(train, name)(tokenizer=tokenizer)
    with pytest.raises(AttributeError):
        _ = train.made_up
