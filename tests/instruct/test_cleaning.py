"""The cleaning rules, one at a time, with the counts they leave."""

from collections import Counter

import pytest

from llava.errors import LlavaError
from llava.instruct import instruct_postprocess
from llava.instruct.cleaning import clean_turns, split_turns
from llava.records import write_records


def split(text):
    counts = Counter()
    return split_turns(text, counts), counts


def clean(question, answer):
    counts = Counter()
    return clean_turns([(question, answer)], counts), counts


def test_dialogue_is_split_into_pairs():
    turns, counts = split("User: A?\nAssistant: B.\nmore of B\nUser: C?\n\nAssistant: D: yes.")
    assert turns == [("A?", "B.\nmore of B"), ("C?", "D: yes.")]
    assert counts == Counter()


def test_bold_speakers_and_unpaired_turns():
    turns, counts = split("Sure!\n**User:** A?\n**Assistant:** B.\nUser: C?\nUser: D?\nAssistant: E.\nUser: F?")
    assert turns == [("A?", "B."), ("D?", "E.")]
    assert counts["unpaired"] == 2


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, I cannot see the image.",
        "As an AI language model, I can't look at it.",
        "I am unable to view the actual picture.",
        "I don't have access to the figure.",
    ],
)
def test_turns_of_a_blind_assistant_are_dropped(answer):
    turns, counts = clean("What is it?", answer)
    assert turns == []
    assert counts == Counter(cannot_see=1)


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("Based on the caption, the mass is round.", "The mass is round.", "leading_phrase"),
        ("According to the provided context, it is a scan.", "It is a scan.", "leading_phrase"),
        ("The mass, as mentioned in the figure caption, is round.", "The mass is round.", "inner_phrase"),
        ("It shows a scan as described in the caption.", "It shows a scan.", "inner_phrase"),
    ],
)
def test_phrases_are_cut(before, after, rule):
    turns, counts = clean("What is it?", before)
    assert turns == [("What is it?", after)]
    assert counts == Counter({rule: 1})


def test_what_still_mentions_the_text_goes():
    turns, counts = clean("What does the caption say?", "It says that it is a scan.")
    assert (turns, counts) == ([], Counter(mentions_text=1))


def test_ordinary_turns_are_left_alone():
    turn = ("Where is the lesion in the picture?", "It lies in the left lobe; I can see the border of the image.")
    turns, counts = clean(*turn)
    assert (turns, counts) == ([turn], Counter())


def test_a_turn_left_empty_is_counted():
    turns, counts = clean("Why?", "Based on the caption.")
    assert turns == []
    assert sum(counts.values()) >= 1


@pytest.mark.parametrize(
    "answer, kept",
    [
        ("Based on contextual clues, the mass is on the left.", "Based on contextual clues, the mass is on the left."),
        ("Findings, in the context of fever, suggest infection.", None),
        ("Based on the description of the lesion, it is benign.", None),
        ("Based on the caption, it is benign.", "It is benign."),
    ],
)
def test_phrases_are_cut_whole(answer, kept):
    from llava.instruct.cleaning import clean_turns

    assert clean_turns([("What is it?", answer)], Counter()) == ([("What is it?", kept)] if kept else [])


@pytest.mark.timeout(100)
@pytest.mark.parametrize("blank", ["\n", " "])
def test_a_million_blanks_take_a_moment(blank):
    """They took hours: a model that writes empty lines until it is stopped is enough for minutes."""
    answer = f"The lung is{blank * 1_000_000}clear, as seen in the caption."
    turns, counts = clean("What is it?", answer)
    assert turns == [("What is it?", f"The lung is{blank * 1_000_000}clear.")]
    assert counts["inner_phrase"] == 1


def test_what_became_of_all_is_said_where_nothing_is_left(tmp_path):
    rows = [{"pair_id": n, "result": "", "refused": n == 0} for n in range(3)]
    write_records(tmp_path / "a.jsonl", rows)
    words = ["--input_path", str(tmp_path / "a.jsonl"), "--output_path", str(tmp_path / "b.json")]
    with pytest.raises(LlavaError, match=r"\(of 3: 1 refused by the writing model, 2 left empty\)$"):
        instruct_postprocess.main(words)
