"""`run_eval` and `run_eval_batch`: joined by id, both sets side by side, and no number from bad input."""

import json
import random
import re
import subprocess
import sys

import pytest

from llava.errors import LlavaError
from llava.eval import run_eval, run_eval_batch
from tests.made_files import yes_no_set


def record(key, question, answer, answer_type, **fields):
    turns = [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": key, "image": f"{key}.jpg", "conversations": turns, "answer_type": answer_type, **fields}


QUESTIONS = [
    record("1", "Which side?", "left lung", "OPEN", organ="CHEST"),
    record("2", "Is it large?", "no", "CLOSED", organ="CHEST"),
    record("3", "Which plane?", "axial", "OPEN", organ="HEAD"),
    record("4", "Is it normal?", "yes", "CLOSED", organ="HEAD"),
]
ANSWERS = {"1": "lung lung lung", "2": "it is normal", "3": "axial", "4": "yes"}


@pytest.fixture
def files(tmp_path):
    """Writes questions and answers; returns the two paths as flags."""

    def write(questions=None, answers=None, raw=None):
        gt, pred = tmp_path / "test.json", tmp_path / "answers.jsonl"
        gt.write_text(json.dumps(QUESTIONS if questions is None else questions))
        answers = ANSWERS.items() if answers is None else answers
        lines = [json.dumps({"question_id": key, "text": text}) for key, text in answers]
        pred.write_text("".join(line + "\n" for line in lines) if raw is None else raw)
        return ["--gt", str(gt), "--pred", str(pred)]

    return write


def run_json(flags, tmp_path, *more):
    output = tmp_path / "out.json"
    run_eval.main([*flags, "--output", str(output), "--overwrite", *more])
    return json.loads(output.read_text())


def test_both_sets_with_counts_and_intervals(files, tmp_path, capsys):
    content = run_json(files(), tmp_path)
    assert (content["questions"], content["open"], content["closed"]) == (4, 2, 2)
    assert content["paper"]["recall"]["value"] == pytest.approx(100 * (0.75 + 1) / 2)
    assert content["strict"]["open recall"]["value"] == pytest.approx(100 * (0.5 + 1) / 2)
    assert content["paper"]["yes/no accuracy"]["value"] == 100
    assert content["strict"]["closed accuracy"]["value"] == 50
    assert content["strict"]["closed accuracy"]["low"] <= 50 <= content["strict"]["closed accuracy"]["high"]
    shown = capsys.readouterr().out
    assert "paper" in shown and "strict" in shown and "4 questions (2 open, 2 closed)" in shown


def test_a_single_question_gives_an_interval_of_0_and_100_alone_and_that_is_said(files, tmp_path, capsys):
    said = "a single question gives one of 0 and 100 alone"
    for questions in (2, 4):
        shown = QUESTIONS[:questions]
        content = run_json(files(shown, [(one["id"], ANSWERS[one["id"]]) for one in shown]), tmp_path)
        open_recall, closed = content["strict"]["open recall"], content["strict"]["closed accuracy"]
        assert (open_recall["low"] is None) == (open_recall["high"] is None) == (questions == 2)
        assert closed["low"] < closed["high"]  # Wilson's, of one that is wrong
        assert (said in capsys.readouterr().out) == (questions == 2)


def test_order_of_the_answers_does_not_matter(files, tmp_path):
    straight = run_json(files(), tmp_path)
    shuffled = list(ANSWERS.items())
    random.Random(3).shuffle(shuffled)
    assert run_json(files(answers=shuffled), tmp_path)["strict"] == straight["strict"]


def test_ids_are_compared_as_text(files, tmp_path):
    content = run_json(files(answers=[(int(key), text) for key, text in ANSWERS.items()]), tmp_path)
    assert content["questions"] == 4


def test_groups_by_record_fields(files, tmp_path):
    groups = run_json(files(), tmp_path)["groups"]["organ"]
    assert groups["CHEST"]["strict closed"] == 0 and groups["HEAD"]["strict closed"] == 100
    assert groups["CHEST"]["questions"] == 2


def test_a_field_that_is_null_groups_with_one_that_is_absent(files, tmp_path):
    questions = [*QUESTIONS[:2], QUESTIONS[2] | {"organ": None}, {**QUESTIONS[3]}]
    del questions[3]["organ"]
    groups = run_json(files(questions), tmp_path, "--group-by", "organ")["groups"]["organ"]
    assert {key: group["questions"] for key, group in groups.items()} == {"CHEST": 2, "-": 2}


def test_groups_and_what_the_bootstrap_draws_can_be_chosen(files, tmp_path):
    questions = [{**question, "image": "one.jpg", "site": "A"} for question in QUESTIONS]
    content = run_json(files(questions), tmp_path, "--group-by", "site")
    assert content["groups"].keys() == {"site"}
    assert content["strict"]["closed accuracy"]["low"] < 50
    # All questions are about one image, so every draw of images would be the same.
    content = run_json(files(questions), tmp_path, "--bootstrap-unit", "image")
    found = content["strict"]["closed accuracy"]
    assert (found["value"], found["low"], found["high"]) == (50, None, None)


def test_images_are_drawn_where_ids_are_lists(files, tmp_path):
    rows = [{"qid": [key], "question": "q", "answer": "no", "answer_type": "CLOSED"} for key in "ab"]
    content = run_json(files(rows, [(["a"], "no"), (["b"], "no")]), tmp_path, "--bootstrap-unit", "image")
    assert content["strict"]["closed accuracy"]["low"] is not None


def test_candidates_and_the_rules_of_another_script(files, tmp_path):
    (tmp_path / "open.json").write_text(json.dumps({"0": ["left lung", "axial"]}))
    plain = run_json(files(), tmp_path)
    other = run_json(files(), tmp_path, "--candidate", str(tmp_path / "open.json"), "--script", "run_eval")
    assert plain["paper"]["open accuracy"]["value"] == 50, "the answer holds the reference"
    assert other["paper"]["open accuracy"]["value"] == 100, "the reference is the nearest candidate"
    (tmp_path / "open.json").write_text(json.dumps({"0": ["left lung", None]}))
    with pytest.raises(LlavaError, match="answer 2 is null; expected a text"):
        run_eval.main([*files(), "--candidate", str(tmp_path / "open.json")])


def test_per_item_output_has_every_question_with_both_sets(files, tmp_path):
    path = tmp_path / "items.jsonl"
    run_eval.main([*files(), "--per-item", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[1]["paper"]["contained"] == 1 and rows[1]["strict"]["correct"] == 0


def test_compare_two_models(files, tmp_path):
    flags = files()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"question_id": key, "text": "no"}) + "\n" for key in ANSWERS))
    found = run_json(flags, tmp_path, "--compare", str(other))["comparison"]["strict closed"]
    assert (found["only_first"], found["only_second"], found["difference"]) == (1, 1, 0)


def test_a_comparison_says_which_questions_it_is_on(files, tmp_path, capsys):
    flags = [*files(), "--on-missing", "skip"]
    other = tmp_path / "other.jsonl"
    lines = [json.dumps({"question_id": key, "text": text}) + "\n" for key, text in ANSWERS.items()]
    for shared in (3, 4):
        other.write_text("".join(lines[:shared]))
        found = run_json(flags, tmp_path, "--compare", str(other))["comparison"]
        assert (found["answered_by_both"], found["questions"]) == (shared, 4)
        assert ("compared on the 3 of 4 questions that both answer\n" in capsys.readouterr().out) == (shared == 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-by", "organ", "orgn"], "test.json: no record has 'orgn' of --group-by; there are: organ"),
        (["--train", "train.json"], "--train is for an audit that is made here; give --audit without a file too"),
        (["--audit", "audit.json", "--train", "train.json"], "--train is for an audit that is made here"),
        (["--image-folder", "images"], "--image-folder is for an audit that is made here"),
        (["--audit", "--train", "t.json", "--image-folder", "none_here"], "--image-folder is not a folder: none_here"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(files, flags, message):
    with pytest.raises(LlavaError, match=re.escape(message)):
        run_eval.main([*files(), *flags])


def test_missing_answers_by_choice(files, tmp_path):
    flags = files(answers=[("1", "left lung"), ("2", "no"), ("3", "axial")])
    skipped = run_json(flags, tmp_path, "--on-missing", "skip")
    wrong = run_json(flags, tmp_path, "--on-missing", "wrong")
    assert (skipped["questions"], skipped["missing_answers"]) == (3, 1)
    assert (wrong["questions"], wrong["missing_answers"]) == (4, 1)
    assert (skipped["strict"]["closed accuracy"]["value"], wrong["strict"]["closed accuracy"]["value"]) == (100, 50)


def test_a_null_answer_is_no_answer_and_never_the_word_none(files, tmp_path):
    """VQA's normaliser makes "None" a 0, which answers "How many?"."""
    questions = [record("1", "How many?", "0", "OPEN"), record("2", "Any?", "no", "CLOSED")]
    flags = files(questions, [("1", None), ("2", "no")])
    with pytest.raises(LlavaError, match=r"1 null \(first '1'\); --on-missing"):
        run_eval.main(flags)
    wrong = run_json(flags, tmp_path, "--on-missing", "wrong")
    assert (wrong["missing_answers"], wrong["paper"]["recall"]["value"], wrong["strict"]["open recall"]["value"]) == (
        1,
        0,
        0,
    )
    assert run_json(flags, tmp_path, "--on-missing", "skip")["open"] == 0


def test_the_question_goes_by_who_speaks(files, tmp_path):
    """A system text or a greeting before the question is neither question nor answer."""
    opening = ({"from": "system", "value": "Answer with yes or no."}, {"from": "gpt", "value": "Hello, no."})
    questions = [record(str(n), "Is it blue?", "yes", "CLOSED") for n in range(3)]
    for n, before in enumerate(([opening[0]], [opening[1]], opening)):
        questions[n]["conversations"] = [*before, *questions[n]["conversations"]]
    items = tmp_path / "items.jsonl"
    content = run_json(files(questions, [(str(n), "yes") for n in range(3)]), tmp_path, "--per-item", str(items))
    assert content["strict"]["closed accuracy"]["value"] == content["paper"]["yes/no accuracy"]["value"] == 100
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    assert {row["question"] for row in rows} == {"Is it blue?"} and {row["reference"] for row in rows} == {"yes"}


def test_chinese_answers_in_a_sentence_score_as_english_ones(files, tmp_path):
    questions = [
        record("0", "图中有肝脏吗?", "有", "CLOSED"),
        record("1", "这是什么器官?", "肝脏", "OPEN"),
        record("2", "左肺健康吗?", "不健康", "CLOSED"),
    ]
    right = run_json(files(questions, [("0", "有。"), ("1", "图中的器官是肝脏。"), ("2", "左肺不健康")]), tmp_path)
    assert right["strict"]["closed accuracy"]["value"] == right["strict"]["open recall"]["value"] == 100
    wrong = run_json(files(questions, [("0", "图中没有肝脏"), ("1", "肾"), ("2", "健康")]), tmp_path)
    assert wrong["strict"]["closed accuracy"]["value"] == wrong["strict"]["open recall"]["value"] == 0


def test_metadata_of_other_programs_are_no_matter(files, tmp_path):
    lines = [{"question_id": key, "text": text, "metadata": "run 3"} for key, text in ANSWERS.items()]
    content = run_json(files(raw="".join(json.dumps(line) + "\n" for line in lines)), tmp_path)
    assert content["questions"] == 4 and "calibration" not in content


@pytest.mark.parametrize(
    "content",
    [{"splits": ["train", "test"]}, {"splits": {"test": "test.json"}}, {"splits": {"test": {"file": "test.json"}}}],
)
def test_a_manifest_of_another_program_says_nothing_of_the_questions(files, tmp_path, content):
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert run_json(files(), tmp_path)["questions_from"] is None


BAD = {
    "missing": ({"answers": [("1", "a"), ("2", "b"), ("3", "c")]}, "1 missing (first '4')"),
    "doubled": ({"answers": [*ANSWERS.items(), ("2", "no")]}, "1 doubled (first '2')"),
    "unknown": ({"answers": [*ANSWERS.items(), ("9", "no")]}, "1 unknown (first '9')"),
    "other ids": ({"answers": [("a", "x"), ("b", "y")]}, "4 missing (first '1'), 2 unknown (first 'a')"),
    "empty": ({"raw": ""}, "empty"),
    "blank": ({"raw": "\n" * 100}, "empty"),
    "not JSON": ({"raw": '{"question_id": "1", "text": "a"}\n{"question_id": "2", "te\n'}, "answers.jsonl line 2"),
    "no text": ({"raw": '{"question_id": "1"}\n'}, 'no "text"'),
    "null id": ({"raw": '{"question_id": null, "text": "a"}\n'}, 'no "question_id"'),
    "text of parts": ({"raw": '{"question_id": "1", "text": ["a"]}\n'}, '"text" is a list'),
    "no probability": (
        {"raw": '{"question_id": "1", "text": "a", "metadata": {"p_yes": "high"}}\n'},
        "answer 1: \"p_yes\" is 'high'; expected a number from 0 to 1",
    ),
    "probability above 1": ({"raw": '{"question_id": "1", "text": "a", "metadata": {"p_yes": 1.5}}\n'}, "is 1.5"),
    "no likelihoods": (
        {"raw": '{"question_id": "1", "text": "a", "metadata": {"option_texts": [1, 2]}}\n'},
        'answer 1: "option_texts" has to be a list of',
    ),
    "null reference": ({"questions": [record("x7", "q", None, "OPEN")]}, 'record 0 ("x7"): turn 2 of the conv'),
    "null raw reference": (
        {"questions": [{"qid": 7, "question": "q", "answer": None, "answer_type": "OPEN"}]},
        'record 0 ("7"): the answer is null',
    ),
    "answer type": (
        {"questions": [record("1", "q", "a", "BOTH")], "answers": [("1", "a")]},
        "unknown answer type 'BOTH'",
    ),
    "doubled question": ({"questions": [QUESTIONS[0], QUESTIONS[0]]}, "more than once"),
    "no questions": ({"questions": []}, "no questions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_and_prints_no_number(name, files, tmp_path, capsys):
    content, message = BAD[name]
    output = tmp_path / "out.json"
    with pytest.raises(LlavaError) as error:
        run_eval.main([*files(**content), "--output", str(output)])
    assert message in str(error.value)
    assert capsys.readouterr().out == "" and not output.exists()


def test_command_ends_with_2_and_one_line(files):
    flags = files(answers=[("1", "a")])
    done = subprocess.run([sys.executable, run_eval.__file__, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the ids of") and done.stderr.count("\n") == 1


def test_raw_vqa_rad_rows_are_questions_too(files, tmp_path):
    rows = [
        {"qid": 7, "image_name": "x.jpg", "question": "How many?", "answer": 4, "answer_type": "OPEN"},
        {"qid": 8, "image_name": "x.jpg", "question": "Any?", "answer": "No", "answer_type": "CLOSED "},
    ]
    content = run_json(files(questions=rows, answers=[("7", "four"), ("8", "no")]), tmp_path)
    assert content["strict"]["open recall"]["value"] == content["strict"]["closed accuracy"]["value"] == 100


def test_published_splits_are_scored_from_the_data_itself(shared_dir, tmp_path):
    """The real 451 questions: every reference answered with itself is all right, in both sets."""
    gt = shared_dir / "vqa_rad" / "testset.json"
    rows = json.loads(gt.read_text())
    pred = tmp_path / "answers.jsonl"
    pred.write_text("".join(json.dumps({"question_id": r["qid"], "text": str(r["answer"])}) + "\n" for r in rows))
    content = run_json(["--gt", str(gt), "--pred", str(pred)], tmp_path, "--bootstrap-samples", "0")
    assert (content["open"], content["closed"]) == (179, 272)
    assert content["strict"]["closed accuracy"]["value"] == content["strict"]["open recall"]["value"] == 100


@pytest.fixture
def tree(tmp_path):
    for part in ("vqa_rad", "pvqa"):
        folder = tmp_path / "data" / part
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps(QUESTIONS))
        answers = tmp_path / "runs" / part
        answers.mkdir(parents=True)
        lines = [json.dumps({"question_id": key, "text": text}) for key, text in ANSWERS.items()]
        (answers / "test-answer-file-9epoch.jsonl").write_text("\n".join(lines) + "\n")
        (answers / "test-answer-file-9epoch-chunk0.jsonl").write_text(lines[0] + "\n")
    return tmp_path


def batch(tree, *more):
    output = tree / run_eval_batch.RESULTS_FILE
    flags = ["--pred_file_parent_path", str(tree / "runs"), "--output", str(output)]
    run_eval_batch.main([*flags, *(more or ["--gt_parent_path", str(tree / "data")])])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_batch_scores_every_answer_file_by_its_data_set(tree):
    rows = batch(tree)
    assert [row["dataset"] for row in rows] == ["pvqa", "vqa_rad"]
    assert all(row["strict"]["closed accuracy"]["value"] == 50 for row in rows)


def test_batch_takes_candidates_for_all_or_those_beside_the_questions(tree):
    for path, answers in ((tree / "all.json", ["axial"]), (tree / "data" / "pvqa" / "candidates.json", ["left"])):
        path.write_text(json.dumps({"0": answers}))
    given = ["--gt_parent_path", str(tree / "data"), "--candidate", str(tree / "all.json")]
    assert [row["settings"]["candidate"] for row in batch(tree, *given)] == [str(tree / "all.json")] * 2
    beside = [row["settings"]["candidate"] for row in batch(tree)]
    assert beside == [str(tree / "data" / "pvqa" / "candidates.json"), None]


def test_batch_takes_the_asked_test_type_only(tree):
    extra = tree / "runs" / "pvqa" / "test_zh-answer-file.jsonl"
    extra.write_text("not JSON\n")
    flags = ["--gt_parent_path", str(tree / "data"), "--target_test_type", "test-answer-file"]
    assert len(batch(tree, *flags)) == 2


def test_batch_writes_nothing_when_a_file_is_bad(tree):
    (tree / "runs" / "pvqa" / "test-answer-file-9epoch.jsonl").write_text("not JSON\n")
    with pytest.raises(LlavaError, match="line 1"):
        batch(tree)
    assert not (tree / run_eval_batch.RESULTS_FILE).exists()


def test_audit_scores_the_clean_subset(files, tmp_path):
    train = tmp_path / "train.json"
    train.write_text(json.dumps([record("t", "Is it large?", "no", "CLOSED") | {"image": "2.jpg"}]))
    content = run_json(files(), tmp_path, "--audit", "--train", str(train))["clean_subset"]
    assert content["audit"]["questions"]["near_duplicates_with_same_answer"] == 1
    for name in ("unseen image", "no near-duplicate question"):
        scores = content["scores"][name]
        assert (scores["questions"], scores["closed"], scores["strict"]["closed accuracy"]["value"]) == (3, 1, 100)


def test_audit_of_other_questions_is_refused(files, tmp_path):
    audit = tmp_path / "audit.json"
    audit.write_text(json.dumps({"items": [{"id": "7"}], "subsets": {}}))
    said = r"audit\.json: the audit is of other questions than .*\.json: 4 are .* \(first .*\); give .* --test .*json$"
    with pytest.raises(LlavaError, match=said):
        run_eval.main([*files(), "--audit", str(audit)])


def test_run_eval_batch_runs_twice_and_says_what_it_leaves_out(tmp_path, caplog):
    from llava.eval.run_eval_batch import main

    gt, _ = yes_no_set(tmp_path, "a")
    runs = tmp_path / "runs"
    runs.mkdir()
    for name in ("a.jsonl", "chunky.jsonl", "a-chunk0-of-2.jsonl"):
        (runs / name).write_text((tmp_path / "a.jsonl").read_text())
    flags = ["--gt", gt, "--output", str(runs / "all.jsonl"), "--bootstrap-samples", "0"]
    for _ in range(2):
        main(["--pred_file_parent_path", str(runs), *flags])
    assert len((runs / "all.jsonl").read_text().splitlines()) == 2
    assert "left out: 1 part of runs that aren't joined" in caplog.text


def test_a_seed_below_zero_is_one_line(tmp_path):
    from llava.data.phantoms.build import write_phantoms
    from llava.eval.run_eval import main

    gt, pred = yes_no_set(tmp_path, "a")
    with pytest.raises(LlavaError, match="--seed"):
        main(["--gt", gt, "--pred", pred, "--seed", "-1"])
    with pytest.raises(LlavaError, match="--seed"):
        write_phantoms(tmp_path / "phantoms", -1)
