"""Samples and prompts: drops, errors, cuts, the plain template, end marks."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.errors import LlavaError
from llava.model.tokenizer import add_tokens
from llava.tokenization import (
    ImageTokens,
    conversation_from_record,
    encode_conversation,
    encode_prompt,
    render_prompt,
    stop_token_ids,
    tokenize_prompt,
)
from tests.tokenization.made_tokenizers import MADE, get

RECORD = [
    {"from": "human", "value": "Where is it?\n<image>"},
    {"from": "gpt", "value": "left"},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "yes"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return get("llama_like")


def test_needs_no_torch():
    script = "import sys, llava.tokenization; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def learned(sample, tokenizer) -> str:
    return tokenizer.decode([label for label in sample.labels if label != IGNORE_INDEX])


def test_an_answer_before_any_question_is_dropped_and_counted(tokenizer):
    record = [{"from": "gpt", "value": "hello"}, *RECORD]
    sample = encode_conversation(record, "v1", tokenizer)
    assert sample.dropped_turns == 1
    assert sample == encode_conversation(RECORD, "v1", tokenizer).__class__(
        sample.input_ids, sample.labels, 1, 0, dropped_turns=1
    )
    assert sample.input_ids == encode_conversation(RECORD, "v1", tokenizer).input_ids


def test_a_sample_cut_before_its_first_answer_has_no_target(tokenizer):
    whole = encode_conversation(RECORD, "v1", tokenizer)
    assert (whole.truncated, whole.num_targets) == (0, sum(label != IGNORE_INDEX for label in whole.labels))
    cut = encode_conversation(RECORD, "v1", tokenizer, max_length=5)
    assert (len(cut.input_ids), cut.truncated, cut.num_targets) == (5, len(whole.input_ids) - 5, 0)
    assert cut.num_images == 1


def test_the_image_is_where_training_and_prompt_want_it(tokenizer):
    conversation = get_template("v1")
    conversation.append_message("USER", "Where is it?\n<image>")
    assert render_prompt(conversation).endswith("USER: <image>\nWhere is it? ASSISTANT:")
    assert len(conversation.messages) == 1, "the caller's conversation is left as it is"
    ids = encode_prompt(conversation, tokenizer)
    assert ids.count(IMAGE_TOKEN_INDEX) == 1
    assert ids == tokenize_prompt(render_prompt(conversation), tokenizer)
    assert ids == encode_conversation(RECORD, "v1", tokenizer).input_ids[: len(ids)]


def test_conversation_from_record_asks_for_the_last_answer():
    conversation = conversation_from_record({"conversations": RECORD}, "mistral_instruct")
    assert render_prompt(conversation) == "[INST] <image>\nWhere is it? [/INST] left </s>[INST] Sure? [/INST]"
    assert render_prompt(conversation_from_record(RECORD[:3], "mistral_instruct")) == render_prompt(conversation)
    assert "Hi there!" in render_prompt(conversation_from_record(RECORD, "simple")), "prompts keep the examples"


def test_numbers_are_text(tokenizer):
    record = {"conversatons": [{"from": "human", "value": 3}, {"from": "gpt", "value": 7}]}
    as_text = [{"from": "human", "value": "3"}, {"from": "gpt", "value": "7"}]
    assert encode_conversation(record, "v1", tokenizer) == encode_conversation(as_text, "v1", tokenizer)


def test_several_images_in_one_question_keep_their_places(tokenizer):
    record = [{"from": "human", "value": "Is <image> older than <image>?"}, {"from": "gpt", "value": "no"}]
    sample = encode_conversation(record, "v1", tokenizer)
    assert sample.num_images == sample.input_ids.count(IMAGE_TOKEN_INDEX) == 2
    assert tokenizer.decode([token for token in sample.input_ids if token >= 0]).count("older than") == 1
    assert "USER: Is <image> older than <image>? ASSISTANT:" in render_prompt(conversation_from_record(record, "v1"))


def test_plain_is_the_image_and_its_caption(tokenizer):
    record = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": "a lung"}]
    sample = encode_conversation(record, "plain", tokenizer)
    assert sample.input_ids[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX]
    assert tokenizer.decode(sample.input_ids[2:]) == learned(sample, tokenizer) == "a lung\n"
    prompt = conversation_from_record(record, "plain")
    assert render_prompt(prompt) == "<image>"
    for wrong in (RECORD, [{"from": "human", "value": "no image"}, record[1]]):
        with pytest.raises(LlavaError, match=r"plain.*takes a question with <image> and one answer"):
            encode_conversation(wrong, "plain", tokenizer)


def test_end_of_an_answer():
    assert stop_token_ids(get_template("v1"), get("llama_like")) == [2]
    byte_level = get("byte_level")
    end = byte_level.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(get_template("mpt"), byte_level) == [byte_level.eos_token_id, end]
    assert stop_token_ids(get_template("simple"), byte_level) == [byte_level.eos_token_id]


def test_a_typed_patch_token_is_no_image():
    tokenizer = MADE["llama_like"]()
    add_tokens(tokenizer, ["<im_patch>", "<im_start>", "<im_end>"], strip_blanks=True)
    patch = tokenizer.convert_tokens_to_ids("<im_patch>")
    image_tokens = ImageTokens("patch", use_start_end=True)
    ids = tokenize_prompt("<im_patch> and <image> and <im_patch><image><im_patch>", tokenizer, image_tokens)
    marks = [token for token in ids if token in (patch, IMAGE_TOKEN_INDEX)]
    assert marks == [patch, IMAGE_TOKEN_INDEX, patch, IMAGE_TOKEN_INDEX, patch]


@pytest.mark.parametrize("name", ["mpt", "v1", "mistral_instruct"])
def test_the_sample_says_what_the_conversation_says(name):
    """LLaMA's tokenizers put a blank before a text; an answer that is tokenised by itself must not get one."""
    tokenizer = get("llama_like")
    template = get_template(name)
    for role, text in zip(template.roles, ["yes", "\n\n\nno, none."]):
        template.append_message(role, text)
    record = [{"from": "human", "value": "yes"}, {"from": "gpt", "value": "\n\n\nno, none."}]
    sample = encode_conversation(record, name, tokenizer)
    assert tokenizer.decode(sample.input_ids[1:]) == template.get_prompt()


def test_scheme_from_config():
    tokenizer = MADE["llama_like"]()
    config = SimpleNamespace(mm_image_token_scheme="patch", mm_use_im_start_end=True)
    with pytest.raises(LlavaError, match="no <im_patch> and no <im_start> and no <im_end>"):
        ImageTokens.from_config(config, tokenizer)
    add_tokens(tokenizer, ["<im_patch>", "<im_start>", "<im_end>"], strip_blanks=True)
    assert ImageTokens.from_config(config, tokenizer) == ImageTokens("patch", True)
    assert ImageTokens.from_config(SimpleNamespace()) == ImageTokens("placeholder", False)
    with pytest.raises(LlavaError, match='unknown image-token scheme "tiles"'):
        ImageTokens("tiles")


def test_start_and_end_tokens_stand_around_the_image():
    tokenizer = MADE["byte_level"]()
    add_tokens(tokenizer, ["<im_start>", "<im_end>"], strip_blanks=False)
    ids = tokenize_prompt("see <image> here", tokenizer, ImageTokens("placeholder", use_start_end=True))
    start, end = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    place = ids.index(IMAGE_TOKEN_INDEX)
    assert (ids[place - 1], ids[place + 1]) == (start, end)


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("v1", "Be brief. USER:"),
        ("mpt", "<|im_start|>system\nBe brief.<|im_end|>"),
        ("llama_2", "[INST] <<SYS>>\nBe brief."),
    ],
)
def test_a_system_turn_takes_the_place_of_the_templates(tokenizer, template, start):
    record = [{"role": "system", "content": "Be brief."}, *RECORD]
    assert render_prompt(conversation_from_record(record, template)).startswith(start)
    sample = encode_conversation(record, template, tokenizer)
    own = get_template(template)
    own.set_system("Be brief.")
    assert sample == encode_conversation(RECORD, own, tokenizer) != encode_conversation(RECORD, template, tokenizer)
    prompt = encode_prompt(conversation_from_record(record, template), tokenizer)
    assert sample.input_ids[: len(prompt)] == prompt


def test_half_of_a_character_pair_is_tokenised_as_its_replacement(tokenizer):
    assert tokenize_prompt("fine \ud83d", tokenizer) == tokenize_prompt("fine \ufffd", tokenizer)
    assert tokenize_prompt("\ud83d\ude00", tokenizer) == tokenize_prompt("\U0001f600", tokenizer)


def test_the_added_tokens_are_listed_once_for_all_records(monkeypatch):
    """The library makes the list anew each time: 1.2 s of 200,000 tokens."""
    own, listed = get("byte_level"), []
    whole = type(own).added_tokens_decoder
    monkeypatch.setattr(type(own), "added_tokens_decoder", property(lambda self: listed.append(1) or whole.fget(self)))
    tokenizer = copy.deepcopy(own)
    listed.clear()
    ids = [tokenize_prompt("USER: yes<|im_end|>no", tokenizer) for _ in range(3)]
    assert ids[0] == ids[1] == ids[2] and len(listed) == 1
