"""Multiple choice: which option an answer names, the likeliest one, consistency over orders; and the two sets read."""

import json

import pytest

from llava.data import audit, validate
from llava.data.convert import main as convert
from llava.data.sources.mcq import option_orders
from llava.errors import LlavaError
from llava.eval import run_eval
from llava.eval.answers.questions import read_med_questions
from llava.eval.metrics.choice import chosen_option
from llava.records import read_json, read_records, write_records

OPTIONS = ["left lung", "right lung", "lung", "heart"]


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("**B**", 1), ("B.", 1), ("B) right lung", 1), ("B: the right one", 1),
        ("B right lung", 1), ("B, because it is", 1), ("The answer is B", 1), ("Answer: (B)", 1), ("answer: b", 1),
        ("I choose option D.", 3), ("The correct choice is C because", 2), ("It shows (D)", 3),
        ("right lung", 1), ("It is the Right Lung.", 1), ("the lung", 2), ("The heart!", 3),
        ("A heart", 3), ("A right lung", 1), ("a mass", None), ("A mass is seen", None),
        ("A. right lung", None), ("A and B", None), ("A, B", None), ("left lung or heart", None), ("", None),
        ("E", None), ("brightlung", None), ("I don't know", None), ("option B or option C", None),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_names(text, option):
    assert chosen_option(text, OPTIONS) == option


def test_a_letter_alone_is_a_letter_even_where_options_are_letters():
    assert chosen_option("A", ["AB", "A", "B", "0"]) == 0
    assert chosen_option("blood group A", ["AB", "A", "B", "0"]) is None  # an article is no word of an option


def test_orders_are_different_and_each_option_takes_every_letter():
    orders = option_orders(4, 7, "seed")
    assert len(set(orders)) == 7 and orders[0] == (0, 1, 2, 3)
    assert all({order[place] for order in orders[:4]} == {0, 1, 2, 3} for place in range(4))
    assert option_orders(4, 7, "seed") == orders and option_orders(2, 5, "seed") == [(0, 1), (1, 0)]


def record(key, letter, options=OPTIONS, **fields):
    turns = [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": letter}]
    return {"id": key, "image": "a.png", "conversations": turns, "answer_type": "CHOICE", "options": options, **fields}


def score(tmp_path, records, answers, *flags):
    (tmp_path / "gt.json").write_text(json.dumps(records))
    rows = [{"question_id": row["id"], **answer} for row, answer in zip(records, answers, strict=True)]
    write_records(tmp_path / "a.jsonl", rows)
    output = tmp_path / "o.json"
    files = ["--gt", str(tmp_path / "gt.json"), "--pred", str(tmp_path / "a.jsonl"), "--output", str(output)]
    files.append("--overwrite")
    run_eval.main([*files, *flags])
    content = read_json(output)
    return content, {name: number["value"] for name, number in content["further"].items()}


def test_likelihoods_of_another_number_of_options_are_refused(tmp_path):
    likelihoods = [{"log_probability": -1.0, "tokens": 1}] * 3
    with pytest.raises(LlavaError, match=r'"1": its answer has 3 "option_letters" for 4 options; answer these'):
        score(tmp_path, [record("1", "B")], [{"text": "B", "metadata": {"option_letters": likelihoods}}])


def test_scores_by_text_by_likelihood_and_over_orders(tmp_path, capsys):
    def likely(letters, texts):
        rows = {"option_letters": [(p, 1) for p in letters], "option_texts": texts}
        return {kind: [{"log_probability": p, "tokens": n} for p, n in found] for kind, found in rows.items()}

    short, long = ["lung", "a long option of words"], ["a long option of words", "lung"]
    records = [
        record("q#0", "A", short, source_id="q"),
        record("q#1", "B", long, source_id="q"),
        record("r#0", "B", short, source_id="r"),
        record("r#1", "A", long, source_id="r"),
    ]
    answers = [
        # The second text is likelier per token, though not in all.
        {"text": "A", "metadata": likely([-1, -2], [(-2, 1), (-6, 6)])},
        {"text": "It is the lung.", "metadata": likely([-2, -1], [(-12, 6), (-1, 1)])},
        {"text": "A", "metadata": likely([-1, -2], [(-2, 1), (-6, 6)])},
        {"text": "both", "metadata": likely([-1, -2], [(-2, 1), (-6, 6)])},
    ]
    content, further = score(tmp_path, records, answers)
    assert (content["questions"], content["open"], content["closed"], content["choice"]) == (4, 0, 0, 4)
    assert further == {
        "choice accuracy": 50,
        "choice unreadable": 25,
        "choice accuracy by letters": 75,
        "choice accuracy by texts": 25 + 25,
        "choice consistency": 50,
    }
    assert content["strict"]["closed accuracy"]["value"] is None, "the closed numbers count closed questions alone"
    shown = capsys.readouterr().out
    assert "0 open, 0 closed, 4 multiple-choice" in shown and "choice: same option in every order" in shown
    _, further = score(tmp_path, [record("x", "heart")], [{"text": "D"}])
    assert further == {"choice accuracy": 100, "choice unreadable": 0}


def test_a_question_without_a_right_option_is_named(tmp_path):
    for wrong, message in ((record("y", "none of these"), "names none"), (record("y", "A", None), "names none")):
        with pytest.raises(LlavaError, match=f'question "y": its answer .* {message}'):
            score(tmp_path, [wrong], [{"text": "D"}])


PMC = """Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label
a.jpg,What is shown?,right lung, A:left lung , B:right lung ,C: lung,D.heart,B
b.jpg,Two alike?,x,A:x,B:X,C:y,D:z,A
"""
OMNI = [
    {"dataset": "D", "question_id": "D_0", "question_type": "Modality Recognition", "question": "Which modality?",
     "gt_answer": "mr", "image_path": "Images/D/c.png", "option_A": "CT", "option_B": "MR", "modality_type": "MRI"},
    {"dataset": "D", "question_id": "D_1", "question_type": "Anatomy", "question": "Organ?", "gt_answer": "Liver.",
     "image_path": "Images/D/c.png", "option_A": "Liver.", "option_B": "Lung", "option_C": "Skin", "option_D": ""},
]  # fmt: skip


@pytest.fixture
def sets(tmp_path):
    (tmp_path / "test.csv").write_text(PMC)
    (tmp_path / "QA_information").mkdir()
    (tmp_path / "QA_information" / "D.json").write_text(json.dumps(OMNI))
    return tmp_path


def make(sets, *flags):
    convert(["mcq", "--output-dir", str(sets / "out"), "--overwrite", *flags])
    return read_records(sets / "out" / "test.json"), read_json(sets / "out" / "manifest.json")


def test_pmc_vqa_and_omnimedvqa_become_records(sets):
    rows, manifest = make(sets, "--input", str(sets / "test.csv"), str(sets / "QA_information"))
    assert [row["id"] for row in rows] == ["test_000002", "D_0", "D_1"]
    listed = "What is shown?\nA. left lung\nB. right lung\nC. lung\nD. heart\n"
    listed += "Answer with the letter of the right option."
    assert rows[0]["conversations"] == [
        {"from": "human", "value": f"{listed}\n<image>"},
        {"from": "gpt", "value": "B"},
    ]
    assert rows[0]["options"] == OPTIONS and "source_id" not in rows[0]
    assert (rows[1]["options"], rows[1]["conversations"][1]["value"]) == (["CT", "MR"], "B")
    assert (rows[1]["modality"], rows[2]["options"]) == ("MRI", ["Liver.", "Lung", "Skin"])
    assert manifest["left_out"] == {"two options are the same": 1}
    assert manifest["splits"]["test"]["answer_types"] == {"CHOICE": 3}
    assert validate.main([str(sets / "out" / "test.json")]) == 0
    assert read_med_questions(sets / "out" / "test.json")[0].options == tuple(OPTIONS)
    audit.main(["--train", str(sets / "out" / "test.json"), "--test", str(sets / "out" / "test.json")])


def test_orders_move_the_right_letter_with_its_option(sets):
    rows, manifest = make(sets, "--input", str(sets / "QA_information"), "--orders", "3")
    assert [row["id"] for row in rows] == ["D_0#0", "D_0#1", "D_1#0", "D_1#1", "D_1#2"]
    assert {row["source_id"] for row in rows} == {"D_0", "D_1"}
    for row in rows:
        right = row["options"]["ABC".index(row["conversations"][1]["value"])]
        assert right == {"D_0": "MR", "D_1": "Liver."}[row["source_id"]]
    assert [row["conversations"][1]["value"] for row in rows] == ["B", "A", "A", "C", "B"]
    assert manifest["corrected"] == {"questions with fewer orders of their options than asked for": 1}
    rows, _ = make(sets, "--input", str(sets / "test.csv"), "--answer", "text")
    assert rows[0]["conversations"][1]["value"] == "right lung"
    assert rows[0]["conversations"][0]["value"].endswith("Answer with the right option.\n<image>")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", PMC.replace(",B\n", ",E\n"), "line 2: the answer is 'E'"),
        ("x.csv", "Figure_path,Question\n", "no column Choice A"),
        ("x.json", json.dumps([{**OMNI[0], "gt_answer": "PET"}]), "record 0: gt_answer 'PET' is none of its options"),
        ("x.json", json.dumps([{"gt_answer": "a", "option_A": "a", "option_B": "b"}]), 'no "image_path"'),
    ],
)
def test_faults_are_named(sets, name, text, message):
    (sets / name).write_text(text)
    with pytest.raises(LlavaError, match=message):
        make(sets, "--input", str(sets / name))
    with pytest.raises(LlavaError, match="neither a file nor a folder"):
        make(sets, "--input", str(sets / "none.json"))


def test_the_orders_of_one_question_are_drawn_together(tmp_path):
    """Four orders that are always answered alike say no more than one: the interval is that of one."""

    def interval(orders):
        records = [record(f"{n}#{order}", "B", source_id=str(n)) for n in range(40) for order in range(orders)]
        content, _ = score(tmp_path, records, [{"text": "B" if int(one["id"][0]) % 2 else "A"} for one in records])
        found = content["further"]["choice accuracy"]
        return found["low"], found["high"]

    assert interval(4) == interval(1)
