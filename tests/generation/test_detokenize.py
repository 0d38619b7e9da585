"""Text that streams: whole characters only, stop strings never shown, and in sum the answer."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llava.generation.detokenize import Detokenizer, TextStream
from tests import tiny
from tests.tokenization.made_tokenizers import byte_level, unigram


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=[lambda: byte_level(True), lambda: unigram(False), None])
def any_tokenizer(request, tokenizer):
    return request.param() if request.param else tokenizer


def stream(tokenizer, ids, stop=(), before=None):
    text = TextStream(Detokenizer(tokenizer), stop, before)
    pieces = []
    for token in ids:
        pieces.append(text.push([token]))
        if text.is_stopped:
            break
    pieces.append(text.flush())
    assert "".join(pieces) == text.text
    return pieces


CHARACTERS = st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\ufffd")


@given(text=st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=40))
def test_any_text_comes_out_as_it_went_in(text, tokenizer):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("text", ["{" + "\xa0" * 12 + "𐀀𐀀", "𐀀" * 30, "é" * 50 + "x", "東京" * 20])
def test_long_runs_of_bytes_come_out_whole(text, tokenizer):
    test_any_text_comes_out_as_it_went_in.hypothesis.inner_test(text, tokenizer)


@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_any_tokens_give_what_they_decode_to(ids, tokenizer):
    """Random ids make broken characters; what is shown is still what the whole decodes to."""
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True).strip()


@given(text=st.text("ab#", max_size=30), stop=st.lists(st.text("ab#", min_size=1, max_size=3), max_size=3))
def test_stop_strings(text, stop, tokenizer):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    places = [text.find(one) for one in stop if one in text]
    shown = "".join(stream(tokenizer, ids, stop))
    # Several tokens may complete a stop string at once, so the first one found is not always the first in the text.
    assert text.startswith(shown)
    assert not any(one in shown for one in stop)
    if places:
        assert len(shown) <= max(places)
    else:
        assert shown == text


def test_pieces_come_as_soon_as_they_can(tokenizer):
    text = "The chest X-ray shows a large nodule"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = stream(tokenizer, ids, ["###"])
    assert sum(bool(piece) for piece in pieces) > len(ids) // 2


def test_half_a_stop_string_at_the_end_is_shown(tokenizer):
    ids = tokenizer("yes ##", add_special_tokens=False)["input_ids"]
    assert "".join(stream(tokenizer, ids, ["###"])) == "yes ##"


def test_blanks_around_are_not_shown(tokenizer):
    ids = tokenizer("  yes  no  ", add_special_tokens=False)["input_ids"]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == "yes  no"


@given(texts=st.tuples(*[st.text(CHARACTERS, min_size=1, max_size=20)] * 2))
@example(texts=("USER: yes ASSISTANT:", " no  no  "))
@example(texts=("日本", "日本"))
def test_a_text_that_is_gone_on_with_keeps_its_blanks(texts, any_tokenizer):
    before, ids = (any_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    said, whole = (any_tokenizer.decode(part, skip_special_tokens=True) for part in (before, before + ids))
    assert said + "".join(stream(any_tokenizer, ids, before=before)) == whole


@given(text=st.text(CHARACTERS, max_size=20))
@example(text="日本 é")
def test_the_bytes_of_tokens_make_the_text(text, any_tokenizer):
    detokenizer = Detokenizer(any_tokenizer)
    ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    said = b"".join(map(detokenizer.token_bytes, ids)).decode()
    assert said.removeprefix(" ") == any_tokenizer.decode(ids).removeprefix(" ")
    assert detokenizer.token(any_tokenizer.eos_token_id) == any_tokenizer.eos_token
