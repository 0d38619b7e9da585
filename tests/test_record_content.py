"""Reading a record's images and turns: what is taken, and the one line that says why it isn't."""

import pytest

from llava.errors import LlavaError
from llava.record_content import (
    figure_domain,
    image_bytes,
    image_key,
    plain_entries,
    question_answer_pairs,
    read_dialogue,
    read_turns,
    record_domains,
    record_images,
    record_options,
    with_entries,
)

HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
SYSTEM = {"role": "system", "content": "s"}


def test_every_key_of_turns_and_a_bare_list():
    expected = [(0, "q"), (1, "a")]
    for key in ("conversations", "conversatons", "messages"):
        assert read_turns({key: [HUMAN, GPT]}) == expected
    assert read_turns([HUMAN, GPT]) == read_turns((HUMAN, GPT)) == expected


@pytest.mark.parametrize(
    ("given", "names", "figure"),
    [
        ("mri", ["mri"], "mri"),
        ({"mri": True, "ct_scan": False}, ["mri"], "mri"),
        ({"gross": 1, "mri": 1}, ["gross", "mri"], "mri"),
        (["ultrasound", "ct_scan"], ["ultrasound", "ct_scan"], "ct_scan"),
        ("ultrasound", ["ultrasound"], None),
        (None, [], None),
    ],
)
def test_domains_in_every_form(given, names, figure):
    assert (record_domains({"domain": given}), figure_domain({"domain": given})) == (names, figure)


def test_null_means_absent():
    entry = {"from": None, "value": None, "role": "user", "content": "q"}
    assert read_turns({"conversations": None, "messages": [entry, GPT]}) == [(0, "q"), (1, "a")]
    assert record_images({"image": None, "images": [None, "a.png"]}) == ["a.png"]


def test_other_names_of_the_speakers():
    assert read_turns([{"from": "user", "value": "q"}, {"from": "assistant", "value": 1.5}]) == [(0, "q"), (1, "1.5")]
    assert read_turns([{"role": "user", "content": 4}, {"role": "assistant", "content": 4.0}]) == [(0, "4"), (1, "4")]


def test_the_system_turn_is_apart():
    dialogue = read_dialogue([SYSTEM, HUMAN, GPT])
    assert (dialogue.system, dialogue.turns) == ("s", [(0, "q"), (1, "a")])
    assert read_dialogue([HUMAN, GPT]).system is None


def test_pairs_go_by_who_speaks():
    turns = read_turns([GPT, HUMAN, GPT, HUMAN])
    assert question_answer_pairs(turns) == [("q", "a")]


def test_plain_entries_keep_what_else_a_turn_says():
    record = {"id": 1, "messages": [SYSTEM, {"role": "user", "content": 7, "time": 3}, GPT], "image": "a.png"}
    entries = plain_entries(record)
    assert entries == [{"from": "system", "value": "s"}, {"from": "human", "value": "7", "time": 3}, GPT]
    assert with_entries(record, entries) == {"id": 1, "image": "a.png", "conversations": entries}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "1"}, 'no "conversations"'),
        ({"conversations": None}, 'no "conversations"'),
        ({"conversations": []}, "is empty"),
        ({"conversations": "q"}, "has to be a list of turns, not str"),
        ({"conversations": HUMAN}, "has to be a list of turns, not dict"),
        ([HUMAN, "a"], 'turn 2 of the conversation is not of the form {"from"'),
        ([{"from": "human"}], "turn 1 of the conversation is not of the form"),
        ([{"value": "q"}], "turn 1 of the conversation is not of the form"),
        ([{"from": ["human"], "value": "q"}], "turn 1 of the conversation is from ['human']; known: human"),
        ([HUMAN, {"from": "tool", "value": "x"}], "turn 2 of the conversation is from 'tool'; known: human"),
        ([HUMAN, SYSTEM], "turn 2 of the conversation is from system, which only the first may be"),
        ([SYSTEM], "a system turn alone"),
        ([HUMAN, GPT, GPT], "turns 2 and 3 of the conversation are both from 'gpt'"),
        ([HUMAN, {"from": "gpt", "value": None}], "turn 2 of the conversation has no text"),
        ([{"from": "human", "value": ["q"]}], "turn 1 of the conversation has no text"),
    ],
)
def test_what_is_wrong_is_said(record, message):
    with pytest.raises(LlavaError) as error:
        read_turns(record)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("record", "images"),
    [
        ({}, []),
        ({"image": ""}, []),
        ({"image": [], "images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ({"image": "a.png", "images": ["b.png"]}, ["a.png"]),
        ({"image": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ({"images": "a.png"}, ["a.png"]),
        ({"images": [b"x", {"bytes": b"y"}]}, [b"x", {"bytes": b"y"}]),
        ({"image": {"bytes": None, "path": "a.png"}}, ["a.png"]),
    ],
)
def test_images_of_a_record(record, images):
    assert record_images(record) == images


def test_an_embedded_image_has_one_key_however_it_is_wrapped():
    assert image_key(b"x") == image_key({"bytes": b"x"}) == image_key(bytearray(b"x")) != image_key(b"y")
    assert image_key("a.png") == "a.png"
    assert len(image_key("data:image/png;base64," + 1000 * "A")) < 100
    with pytest.raises(LlavaError, match="must be a path, bytes"):
        image_bytes(7)


def test_options_of_a_record():
    assert record_options({"options": None}) == []
    assert record_options({"options": [4.0, " left "]}) == ["4", "left"]
    assert record_options({"options": {"B": "b", "A": "a", "C": None}}) == ["a", "b"]
    for options in ("a", ["a"], ["a", "A"], [str(n) for n in range(11)]):
        with pytest.raises(LlavaError, match='"options" has to be'):
            record_options({"options": options})
