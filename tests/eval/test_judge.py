"""The chat evaluation: prompts, tolerant reading, the repair request, both orders, and the real questions."""

import json
import math
import subprocess
import sys

import pytest

from llava.errors import LlavaError
from llava.eval.chat.judge import build_job, read_scores, repair_job
from llava.eval.chat.summary import order_agreement, read_scores_file, summary_table
from llava.eval.eval_multimodal_chat_gpt_score import join_by_id
from llava.openai_api import ChatResult
from llava.records import read_records, write_records
from tests.made_files import write
from tests.openai_server import OpenAIServer

QUESTION = {
    "question_id": 7,
    "text": "What is shown?\n<image>",
    "gpt4_answer": "A scan.",
    "fig_caption": "CT of the chest.",
    "fig_label": "Fig. 2",
    "in_text_mention": [{"tokens": "Fig. 2 shows a mass ."}, "Plain words."],
    "domain": {"chest_xray": False, "ct_scan": True},
    "type": "conversation",
}


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 7\nBecause.", (8, 7)),
        ("8.5, 7\n", (8.5, 7)),
        ("\n\n8/10 7/10\nx", (8, 7)),
        ("Assistant 1: 9 Assistant 2: 3\n10 10", (9, 3)),
        ("**8 6**", (8, 6)),
        ("Both are fine.\n8 7", None),
        ("8\n7", None),
        ("8 7 6", None),
        ("80 70", None),
        ("", None),
    ],
)
def test_first_line_is_read_tolerantly(reply, scores):
    got = read_scores(reply)
    assert got == scores if scores else all(math.isnan(score) for score in got)


def test_prompt_holds_all_in_order_and_no_placeholder():
    text = build_job(QUESTION, {"text": "The model says."}).messages[-1]["content"]
    parts = [
        "Fig. 2: CT of the chest.",
        "Fig. 2 shows a mass",
        "Plain words.",
        "What is shown?",
        "A scan.",
        "The model",
    ]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert "<image>" not in text
    swapped = build_job(QUESTION, {"text": "The model says."}, swapped=True).messages[-1]["content"]
    assert swapped.index("The model says.") < swapped.index("A scan.")


def test_repair_only_where_scores_are_missing():
    job = build_job(QUESTION, {"text": "x"})
    assert repair_job(job, ChatResult("8 7", "stop", "m")) is None
    again = repair_job(job, ChatResult("Well.", "stop", "m"))
    assert [message["role"] for message in again.messages] == ["system", "user", "assistant", "user"]


def score(*words):
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)


@pytest.fixture
def files(tmp_path):
    questions = [{**QUESTION, "question_id": n, "text": f"Question {n}?\n<image>"} for n in range(40)]
    answers = [{"question_id": n, "text": f"Answer {n}.", "model_id": "m"} for n in range(40)][::-1]
    write_records(tmp_path / "q.jsonl", questions)
    write_records(tmp_path / "a.jsonl", answers)
    return tmp_path


def test_scorer_repairs_swaps_and_joins_by_id(files):
    words = ["--question-file", str(files / "q.jsonl"), "--answers-file", str(files / "a.jsonl"), "--swap"]
    words += ["--scores-file", str(files / "s.jsonl"), "--api-model", "m"]
    with OpenAIServer("--mode", "judge-messy", "--faults", "0.1", "--kinds", "429,500") as server:
        done = score("llava.eval.eval_multimodal_chat_gpt_score", *words, "--api-base", server.url)
        assert done.returncode == 0, done.stderr
    rows = read_records(files / "s.jsonl")
    assert len(rows) == 80
    assert all(row["answer"] == f"Answer {row['question_id']}." for row in rows), "joined by line, not by id"
    assert all(row["scores"] for row in rows), "an unreadable first line was not repaired"
    assert {row["judge_model"] for row in rows} == {"m"}
    judged = read_scores_file(files / "s.jsonl")
    assert judged.summary.rows == 40
    assert judged.agreement["questions"] == 40
    table = score("llava.eval.summarize_gpt_review", "--scores-file", str(files / "s.jsonl"))
    assert "both orders of 40 questions" in table.stdout


def test_ids_that_do_not_match_are_named_and_nothing_is_asked(files):
    write_records(files / "a.jsonl", [{"question_id": 99, "text": "x"}])
    words = ["--question-file", str(files / "q.jsonl"), "--answers-file", str(files / "a.jsonl")]
    words += ["--scores-file", str(files / "s.jsonl"), "--api-model", "m"]
    with OpenAIServer("--mode", "judge") as server:
        done = score("llava.eval.eval_multimodal_chat_gpt_score", *words, "--api-base", server.url)
        assert server.stats()["requests"] == {}
    assert done.returncode == 2
    assert "40 questions" in done.stderr
    assert "99" in done.stderr


def test_agreement_of_orders():
    rows = [
        {"question_id": 1, "swapped": False, "scores": [8, 6]},
        {"question_id": 1, "swapped": True, "scores": [7, 5]},
        {"question_id": 2, "swapped": False, "scores": [8, 6]},
        {"question_id": 2, "swapped": True, "scores": [6, 8]},
    ]
    assert order_agreement(rows) == {"questions": 2, "same_winner": 0.5, "bias_to_first": 1.0}
    assert order_agreement(rows[:1]) is None


def test_unreadable_rows_are_counted_and_left_out(tmp_path):
    rows = [{"question_id": 1, "type": "conversation", "gpt_eval": "5 10\nx"}]
    rows += [{"question_id": 2, "type": "conversation", "gpt_eval": "no idea"}]
    rows += [{"question_id": 3, "type": "conversation", "result": "10 5\nx"}]
    write_records(tmp_path / "s.jsonl", rows)
    judged = read_scores_file(tmp_path / "s.jsonl")
    assert (judged.summary.rows, judged.summary.unreadable) == (3, 1)
    group = judged.summary.groups["conversation"]
    assert (group.data_size, group.pred_relative_score, group.ratio_of_means) == (2, 125.0, 100.0)
    assert "a single question gives no interval" not in summary_table([judged])
    write_records(tmp_path / "one.jsonl", rows[:1])
    lines = summary_table([read_scores_file(tmp_path / "one.jsonl")]).splitlines()
    assert "a single question gives no interval" in lines
    assert next(line.split() for line in lines if line.startswith("conversation")) == [
        *("conversation", "200.0", "-", "200.0", "1")
    ]


def test_a_domain_may_be_named_as_a_text(tmp_path):
    rows = [{"question_id": n, "gpt_eval": "5 10", "domain": domain} for n, domain in enumerate(("mri", {"mri": True}))]
    write_records(tmp_path / "s.jsonl", rows)
    assert read_scores_file(tmp_path / "s.jsonl").summary.groups["mri"].data_size == 2


def test_the_real_questions(shared_dir, tmp_path):
    questions = shared_dir / "llava_med_eval" / "llava_med_eval_qa50_qa.jsonl"
    if not questions.is_file():
        pytest.skip(f"no chat-evaluation questions at {questions}")
    answers = [{"question_id": row["question_id"], "text": "An image."} for row in read_records(questions)]
    write_records(tmp_path / "a.jsonl", answers)
    words = ["--question_input_path", str(questions), "--input_path", str(tmp_path / "a.jsonl")]
    words += ["--output_path", str(tmp_path / "s.jsonl"), "--api-model", "m"]
    with OpenAIServer("--mode", "judge") as server:
        done = score("llava.eval.eval_multimodal_chat_gpt_score", *words, "--api-base", server.url)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "summary.json"
    table = score("llava.eval.summarize_gpt_review", "--scores-file", str(tmp_path / "s.jsonl"), "--json", str(out))
    assert table.returncode == 0, table.stderr
    sizes = {name: group["data_size"] for name, group in json.loads(out.read_text())[0]["groups"].items()}
    assert (sizes["conversation"], sizes["detailed_description"], sizes["overall"]) == (143, 50, 193)
    domains = ("chest_xray", "mri", "histology", "gross", "ct_scan")
    assert [sizes[name] for name in domains] == [37, 38, 44, 34, 40]


def test_answers_are_joined_by_id_as_text_and_have_to_be_texts(tmp_path):
    write_records(tmp_path / "q.jsonl", [QUESTION])
    write_records(tmp_path / "a.jsonl", [{"question_id": "7", "text": 4}])
    (pair,) = join_by_id(str(tmp_path / "q.jsonl"), str(tmp_path / "a.jsonl"))
    assert (pair[0]["question_id"], pair[1]["text"]) == (7, "4") and build_job(*pair)
    write_records(tmp_path / "a.jsonl", [{"question_id": "7", "text": None}])
    with pytest.raises(LlavaError, match=r"a\.jsonl record 0: no text"):
        join_by_id(str(tmp_path / "q.jsonl"), str(tmp_path / "a.jsonl"))
    write_records(tmp_path / "a.jsonl", [{"question_id": "7", "text": ["a", "b"]}])
    with pytest.raises(LlavaError, match=r'a\.jsonl record 0: "text" is a list; expected a text'):
        join_by_id(str(tmp_path / "q.jsonl"), str(tmp_path / "a.jsonl"))


def test_a_judge_that_hangs_is_given_up(files):
    write_records(files / "q.jsonl", read_records(files / "q.jsonl")[:1])
    write_records(files / "a.jsonl", [{"question_id": 0, "text": "Answer.", "model_id": "m"}])
    words = ["--question-file", str(files / "q.jsonl"), "--answers-file", str(files / "a.jsonl")]
    words += ["--scores-file", str(files / "s.jsonl"), "--api-model", "m", "--max-retries", "0"]
    with OpenAIServer("--mode", "judge", "--faults", "1", "--kinds", "timeout", "--hang", "20") as server:
        words += ["--api-base", server.url]
        done = score("llava.eval.eval_multimodal_chat_gpt_score", *words, "--request-timeout", "0.3")
        assert done.returncode == 1 and "timed out" in done.stdout.lower(), done.stdout
        assert sum(server.stats()["requests"].values()) == 1


def test_a_batch_of_other_requests_is_not_taken_for_this_run(tmp_path):
    from types import SimpleNamespace

    from llava.openai_api import ChatJob
    from llava.openai_client.batch import _digest, _refuse_another

    settings = SimpleNamespace(model="judge", reasoning_model=False)
    old, new = (ChatJob("1", [{"role": "user", "content": text}]) for text in ("old answer", "new answer"))
    state = {"id": "b", "keys": {"item-0": "1"}, "requests": {"item-0": _digest(old, settings)}}
    _refuse_another(state, [old], settings, tmp_path)
    with pytest.raises(LlavaError, match="another run"):
        _refuse_another(state, [new], settings, tmp_path)


def test_a_judged_batch_of_other_answers_is_refused(tmp_path, monkeypatch):
    from contextlib import asynccontextmanager

    from llava.eval.eval_multimodal_chat_gpt_score import main
    from llava.openai_client import batch

    @asynccontextmanager
    async def client(*_, **__):
        yield None  # never asked

    monkeypatch.setattr(batch, "make_client", client)
    question = write(tmp_path / "q.jsonl", [{"question_id": 1, "text": "What?", "gpt4_answer": "A lung."}])
    answer = write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "new"}])
    left = {"id": "old", "keys": {"item-0": "1"}, "requests": {"item-0": "of another answer"}}
    (tmp_path / "s.jsonl.batch.json").write_text(json.dumps(left))
    flags = ["--api-model", "judge", "--api-key", "k", "--api-base", "http://127.0.0.1:9/v1", "--batch-api"]
    with pytest.raises(LlavaError, match="another run"):
        main(
            ["--question-file", question, "--answers-file", answer, "--scores-file", str(tmp_path / "s.jsonl"), *flags]
        )


def test_a_zero_for_the_model_counts_in_both_orders():
    from llava.eval.chat.judge import repair_job
    from llava.eval.chat.scores import summarize_chat
    from llava.eval.eval_multimodal_chat_gpt_score import score_row
    from llava.openai_api import ChatJob, ChatResult

    question = {"question_id": 1, "text": "q", "gpt4_answer": "r", "type": "conversation"}
    rows = [
        score_row(question, {"text": "m"}, swapped, ChatResult(reply, "stop", "judge"))
        for swapped, reply in ((False, "8 0"), (True, "0 8"))
    ]
    assert [row["scores"] for row in rows] == [[8.0, 0.0], [8.0, 0.0]]
    assert repair_job(ChatJob("1", []), ChatResult("0 8", "stop", "judge")) is None
    zero = score_row(question, {"text": "m"}, False, ChatResult("0 8", "stop", "judge"))
    assert summarize_chat([zero]).zero_reference == 1


def test_rows_without_an_id_stay_apart_and_odd_scores_are_unreadable(tmp_path):
    from llava.eval.chat.summary import read_scores_file

    rows = [{"question_id": None, "gpt_eval": f"8 {score}"} for score in (2, 4, 6)]
    assert read_scores_file(write(tmp_path / "a.jsonl", rows)).summary.rows == 3
    odd = [
        {"question_id": 1, "scores": 8},
        {"question_id": 2, "scores": ["8", "7"]},
        {"question_id": 3, "scores": [8, 4]},
    ]
    summary = read_scores_file(write(tmp_path / "b.jsonl", odd)).summary
    assert (summary.rows, summary.unreadable) == (3, 2)


def test_a_mention_that_is_a_text_is_one_mention():
    from llava.eval.chat.judge import mentions

    assert mentions({"in_text_mention": "Figure 1 shows it."}) == ["Figure 1 shows it."]


def test_judgements_of_two_models_in_one_file_are_refused(tmp_path):
    rows = [{"question_id": number, "scores": [8, score], "swapped": False} for score in (4, 8) for number in (1, 2)]
    with pytest.raises(LlavaError, match=r"s\.jsonl: 2 questions are judged more than once in one order, first '1'"):
        read_scores_file(write(tmp_path / "s.jsonl", rows))


def test_files_of_one_name_and_unread_orders_are_told_apart(tmp_path):
    rows = [
        {"question_id": number, "scores": scores, "swapped": swapped}
        for number in range(3)
        for swapped, scores in ((False, [8, 4]), (True, [8, 6] if number else None))
    ]
    for name, part in (("a", rows), ("b", rows[2:])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "s.jsonl", part)
    judged = [read_scores_file(tmp_path / name / "s.jsonl") for name in "ab"]
    assert [one.half_read for one in judged] == [1, 0] and judged[0].as_dict()["half_read"] == 1
    table = summary_table(judged)
    assert all(table.splitlines()[0].count(f"relative {tmp_path / name / 's.jsonl'}") == 1 for name in "ab")
    assert table.count("could be read in one of both orders alone") == 1


def test_a_row_counts_once_in_each_group(tmp_path):
    rows = [{"question_id": 1, "scores": [8, 4], "type": "mri", "domain": "mri"}]
    rows += [{"question_id": 2, "scores": [8, 4], "type": "overall"}, {"question_id": 3, "scores": [8, 4], "type": [1]}]
    groups = read_scores_file(write(tmp_path / "s.jsonl", rows)).summary.groups
    assert {name: group.data_size for name, group in groups.items()} == {"mri": 1, "[1]": 1, "overall": 3}
