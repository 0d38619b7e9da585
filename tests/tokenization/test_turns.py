"""Reading a record's conversation: what is taken, and the one line that says why it isn't."""

import pytest

from llava.errors import LlavaError
from llava.tokenization import read_turns

HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def test_both_spellings_and_a_bare_list():
    expected = [(0, "q"), (1, "a")]
    for record in ({"conversations": [HUMAN, GPT]}, {"conversatons": [HUMAN, GPT]}, [HUMAN, GPT], (HUMAN, GPT)):
        assert read_turns(record) == expected


def test_other_names_of_the_speakers():
    assert read_turns([{"from": "user", "value": "q"}, {"from": "assistant", "value": 1.5}]) == [(0, "q"), (1, "1.5")]


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
        ([HUMAN, {"from": "system", "value": "x"}], "turn 2 of the conversation is from 'system'; known: human"),
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
