"""Golden G5: the paper set equals the published metric scripts, number by number."""

import json

import pytest

from llava.eval.metrics import normalize_word, paper_item, paper_summary
from llava.eval.metrics.paper import Candidates
from tests.conftest import golden_cases

SCRIPTS = {
    "run_eval": "run_eval",
    "run_eval_batch": "run_eval_batch",
    # The published PathVQA script can't run; the recorded version has the candidate set bound in.
    "run_eval_pvqa_patched_candidate": "run_eval_pvqa",
}
TOLERANCE = 1e-9


def cases_with(name: str) -> list:
    """The cases that hold the file `name`; an empty list would hide a renamed file."""
    cases = golden_cases("G5_metrics")
    found = [case for case in cases if case.values[0] is None or (case.values[0] / name).exists()]
    if not found:
        raise FileNotFoundError(f"no G5 case holds {name}")
    return found


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(record):
    return record.get("conversations") or record["conversatons"]


def summaries(gt, pred, candidates):
    """Our numbers by the published scripts' names, joined by order as they do."""
    pairs = list(zip(gt, pred))
    pool = Candidates(candidates)
    items = [paper_item(p["text"], turns(g)[1]["value"], pool) for g, p in pairs]
    types = [g["answer_type"] for g, _ in pairs]
    return {name: paper_summary(items, types, script) for name, script in SCRIPTS.items()}


def check_numbers(ours, golden):
    checked = 0
    for name, numbers in ours.items():
        expected = golden[name]
        if "error" in expected:  # where the script fails, none of its numbers may come out as if it had run
            assert None in numbers.values()
            continue
        assert set(numbers) == set(expected["numbers"])
        for key, value in expected["numbers"].items():
            assert numbers[key] == pytest.approx(value, abs=TOLERANCE), (name, key)
            checked += 1
    return checked


@pytest.mark.parametrize("case", cases_with("normalize_word.json"))
def test_normalisation_is_the_published_one(case):
    vectors = read(case / "normalize_word.json")
    assert vectors
    wrong = [(text, expected, normalize_word(text)) for text, expected in vectors if normalize_word(text) != expected]
    assert not wrong


@pytest.mark.parametrize("case", cases_with("per_item.json"))
def test_each_item_scores_as_published(case):
    pool = Candidates(read(case / "candidate.json")["0"])
    rows = read(case / "per_item.json")
    assert rows
    for row in rows:
        item = paper_item(row["pred"], row["gt"], pool)
        got = [item.exact, item.f1, item.precision, item.recall, item.appearance, item.contained]
        expected = [row["exact"], *row["f1_p_r"], row["appearance"], row["contained"]]
        assert got == pytest.approx(expected, abs=TOLERANCE), row["id"]
        assert normalize_word(str(row["pred"]).lower()) == row["norm_pred"]
        assert normalize_word(str(row["gt"]).lower()) == row["norm_gt"]


@pytest.mark.parametrize("case", cases_with("pred.jsonl"))
def test_summaries_are_the_published_ones(case):
    ours = summaries(read(case / "gt.json"), read_lines(case / "pred.jsonl"), read(case / "candidate.json")["0"])
    assert check_numbers(ours, read(case / "results.json"))


@pytest.mark.parametrize("case", cases_with("gt_pseudo.json"))
def test_shipped_answer_files_score_as_published(case):
    gt, candidates = read(case / "gt_pseudo.json"), read(case / "candidate.json")["0"]
    pool = Candidates(candidates)
    reference = {str(record["id"]): turns(record)[1]["value"] for record in gt}
    for name, golden in read(case / "results.json").items():
        pred = read_lines(case / f"pred_{name}.jsonl")
        kept = {str(record["id"]): record for record in gt}
        ids = [str(row[0]) for row in read(case / f"per_item_{name}.json")]
        texts = {str(answer["question_id"]): answer["text"] for answer in pred}
        for row in read(case / f"per_item_{name}.json"):
            item = paper_item(texts[str(row[0])], reference[str(row[0])], pool)
            got = [item.exact, item.f1, item.precision, item.recall, item.appearance, item.contained]
            assert got == pytest.approx(row[1:], abs=TOLERANCE), (name, row[0])
        ours = summaries([kept[key] for key in ids], [{"text": texts[key]} for key in ids], candidates)
        assert check_numbers(ours, golden), name


@pytest.mark.parametrize("case", golden_cases("G5_metrics/edge"))
def test_subsets_of_a_set(case):
    source = case.parent / "made_up_200"
    gt = {record["id"]: record for record in read(source / "gt.json")}
    pred = {answer["question_id"]: answer for answer in read_lines(source / "pred.jsonl")}
    candidates = read(source / "candidate.json")["0"]
    edges = read(case / "results.json")
    assert edges
    for edge in edges.values():
        ours = summaries([gt[key] for key in edge["gt_ids"]], [pred[key] for key in edge["pred_ids"]], candidates)
        check_numbers(ours, edge)
