"""For any conversation, any template but the ### ones and whatever tokenizer: exactly the answers are targets."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates, get_template
from llava.model.tokenizer import add_tokens
from llava.record_content import ASSISTANT, read_turns
from llava.tokenization import ImageTokens, conversation_from_record, encode_conversation, encode_prompt, expand_images
from tests.tokenization.made_tokenizers import get, names

TEMPLATES = sorted(name for name, template in conv_templates.items() if template.sep_style is not SeparatorStyle.SINGLE)
TRICKY = [
    "", " ", "yes", "no\n", "\n\nno", "</s>", "<s> a", "a </s> b", "<unk>", "<|im_end|>", "<|im_start|>assistant\n",
    "###", "USER: who? ASSISTANT: me", "[/INST] yes </s>", "[INST]", "  two  blanks  ", "\ttab\r\n", "<im_patch>",
    "<im_start>", "肺の結節", "e\u0301\u0302\u200b", "🫁 2×3 mm²", ":", "yes no", "no, none.", "<|endoftext|>",
    "<Image></Image>", "7", "\u00a0x",
]  # fmt: skip
# "▁" is LLaMA's own mark for a blank; surrogates are no text.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12)
TEXT = st.one_of(st.sampled_from(TRICKY), ANY_TEXT, st.lists(st.sampled_from(TRICKY), max_size=3).map("".join))
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@st.composite
def records(draw, template_name: str):
    """A record for the template, and how many images each question has."""
    if get_template(template_name).sep_style is SeparatorStyle.PLAIN:
        turns = [DEFAULT_IMAGE_TOKEN + draw(TEXT), draw(TEXT)]
    else:
        turns = draw(st.lists(TEXT, min_size=1, max_size=6))
        for number in range(0, len(turns), 2):
            place = draw(st.sampled_from(["{}", "{}", "<image>\n{}", "{}\n<image>", "<image>{}<image>"]))
            turns[number] = place.format(turns[number].replace("{", "").replace("}", ""))
    return [{"from": ["human", "gpt"][number % 2], "value": text} for number, text in enumerate(turns)]


def schemes(tokenizer_name: str) -> tuple:
    """(tokenizer, placeholder scheme, patch scheme), the tokenizer with all image tokens."""
    tokenizer = get(tokenizer_name)
    add_tokens(tokenizer, ["<im_patch>", "<im_start>", "<im_end>"], strip_blanks=tokenizer_name == "llama_v10")
    return (
        tokenizer,
        ImageTokens("placeholder", use_start_end=True),
        ImageTokens("placeholder"),
        ImageTokens("patch", True),
    )


@pytest.mark.parametrize("tokenizer_name", names())
@FAST
@given(data=st.data())
def test_exactly_the_answers_are_targets(tokenizer_name, data):
    tokenizer, *all_schemes = schemes(tokenizer_name)
    image_tokens = data.draw(st.sampled_from(all_schemes))
    name = data.draw(st.sampled_from(TEMPLATES))
    record = data.draw(records(name))
    sample = encode_conversation(record, name, tokenizer, image_tokens)

    ids, labels = sample.input_ids, sample.labels
    assert len(ids) == len(labels)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
    assert ids.count(IMAGE_TOKEN_INDEX) == sample.num_images == images(record)
    assert IMAGE_TOKEN_INDEX not in labels

    template = get_template(name)
    targets = [token for token in labels if token != IGNORE_INDEX]
    expected = answers(template, record)
    if tokenizer_name.startswith("byte"):
        assert tokenizer.decode(targets) == expected
    else:  # SentencePiece's kind: blanks at the beginning and behind special tokens come and go
        assert solid(tokenizer.decode(targets)) == solid(expected)


@pytest.mark.parametrize("tokenizer_name", names())
@FAST
@given(data=st.data())
def test_every_prompt_on_the_way_begins_the_sample(tokenizer_name, data):
    """Turn by turn: what is before an answer is the prompt's ids, unmasked is what follows, up to its end."""
    tokenizer, *all_schemes = schemes(tokenizer_name)
    image_tokens = data.draw(st.sampled_from(all_schemes))
    name = data.draw(st.sampled_from(TEMPLATES))
    record = data.draw(records(name))
    whole = encode_conversation(record, name, tokenizer, image_tokens)
    end = 0
    for number in range(1, len(record), 2):
        if get_template(name).sep_style is not SeparatorStyle.PLAIN and not record[number]["value"]:
            continue  # an empty answer isn't rendered: its cue stands before the next question
        asked = encode_prompt(conversation_from_record(record[:number], name), tokenizer, image_tokens)
        answered = encode_conversation(record[: number + 1], name, tokenizer, image_tokens).input_ids
        assert whole.input_ids[: len(answered)] == answered
        assert whole.input_ids[: len(asked)] == asked
        assert set(whole.labels[end : len(asked)]) <= {IGNORE_INDEX}
        end = len(answered)
        learned = whole.labels[len(asked) : end]
        assert learned == whole.input_ids[len(asked) : end]
        assert learned or not record[number]["value"].strip()  # v1.0's tokens swallow blanks, a blank caption whole
    assert set(whole.labels[end:]) <= {IGNORE_INDEX}


@pytest.mark.parametrize("tokenizer_name", names())
@FAST
@given(data=st.data())
def test_expanding_and_cutting_while_encoding_is_the_same_as_after(tokenizer_name, data):
    tokenizer, *all_schemes = schemes(tokenizer_name)
    image_tokens = data.draw(st.sampled_from(all_schemes))
    name = data.draw(st.sampled_from(sorted(conv_templates)))
    record = data.draw(records(name))
    features = [data.draw(st.integers(0, 9)) for _ in range(images(record))]
    length = data.draw(st.integers(1, 80))
    plain = encode_conversation(record, name, tokenizer, image_tokens)
    at_once = encode_conversation(record, name, tokenizer, image_tokens, features_per_image=features, max_length=length)
    ids, labels = expand_images(plain.input_ids, plain.labels, features)
    assert at_once.input_ids == ids[:length].tolist()
    assert at_once.truncated == max(0, len(ids) - length)
    if get_template(name).sep_style is not SeparatorStyle.SINGLE:  # v0's arithmetic counts features
        assert at_once.labels == labels[:length].tolist()


def images(record) -> int:
    return sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in record)


def answers(template, record) -> str:
    plain = template.sep_style is SeparatorStyle.PLAIN
    end = template.stop_str
    texts = [turn.text for turn in read_turns(record) if turn.role == ASSISTANT]
    if plain:
        return texts[0] + end
    texts = [text.strip() if template.strip_turns else text for text in texts if text]
    before, after = {
        SeparatorStyle.TWO: (" ", ""),
        SeparatorStyle.LLAMA_2: (" ", " "),
        SeparatorStyle.MPT: ("", ""),
    }[template.sep_style]
    return "".join(before + text + after + end for text in texts)


def solid(text: str) -> str:
    return "".join(text.split())
