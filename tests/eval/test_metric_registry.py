"""A decorated function is a metric everywhere: table, intervals, groups, items, comparison, clean subset and report."""

import dataclasses
import json

import pytest

from llava.errors import LlavaError
from llava.eval import report, run_eval, run_eval_batch
from llava.eval.metrics import OPEN, Answer, all_metrics, metric, registry


@pytest.fixture
def length():
    """A metric in words, for the time of a test."""

    @metric("open length", counts=OPEN, unit="words", higher_is_better=False)
    def open_length(answer: Answer) -> float:
        return float(len(answer.prediction.split()))

    registry.all_metrics.cache_clear()
    yield open_length
    del registry._METRICS["further", "open length"]
    registry.all_metrics.cache_clear()


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "vqa_rad"
    folder.mkdir()
    turns = [{"from": "human", "value": "Where?\n<image>"}, {"from": "gpt", "value": "left lung"}]
    rows = [
        {"id": n, "image": "a.png", "conversations": turns, "answer_type": "OPEN", "organ": "AB"[n % 2]}
        for n in range(4)
    ]
    (folder / "test.json").write_text(json.dumps([*rows, {**rows[0], "id": 4, "answer_type": "CLOSED"}]))
    (folder / "train.json").write_text(json.dumps([{**rows[0], "image": "b.png"}]))
    for name, texts in (("a", ["left"] * 5), ("b", ["in the left lung"] * 5)):
        lines = [json.dumps({"question_id": n, "text": text}) for n, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_it_is_found_by_everything(length, files, tmp_path, capsys):
    output, items, train = tmp_path / "out.json", tmp_path / "items.jsonl", str(files / "train.json")
    flags = ["--gt", str(files / "test.json"), "--pred", str(files / "a.jsonl"), "--output", str(output)]
    run_eval.main([*flags, "--compare", str(files / "b.jsonl"), "--per-item", str(items), "--audit", "--train", train])
    content = json.loads(output.read_text())
    assert content["further"]["open length"] == {"value": 1, "low": 1, "high": 1, "count": 4}
    assert content["groups"]["organ"]["A"]["open length"] == 1
    found = content["comparison"]["open length"]
    assert (found["first"], found["second"], found["difference"], found["questions"]) == (1, 4, 3, 4)
    assert content["clean_subset"]["scores"]["unseen image"]["further"]["open length"]["value"] == 1
    rows = [json.loads(line)["further"] for line in items.read_text().splitlines()]
    assert rows[0]["open length"] == 1 and "open length" not in rows[4]  # a closed question doesn't count
    shown = capsys.readouterr().out
    assert "open length (words) (less is better)" in shown
    assert "open length (words) 1.00 4.00 +3.00 [+3.00, +3.00]" in " ".join(shown.split())
    page = tmp_path / "page.html"
    report.main(
        ["--pred", *(f"{n}={files / n}.jsonl" for n in "ab"), "--gt", str(files / "test.json"), "--output", str(page)]
    )
    assert page.read_text().count("<th>open length (words)</th>") == 3  # scores, and the groups of each file
    assert "| open length (words) |" in page.with_suffix(".md").read_text()
    run_eval_batch.main(
        ["--pred_file_parent_path", str(files), "--gt", str(files / "test.json"), "--output", str(output)]
    )
    assert "open length (words)" in capsys.readouterr().out


def test_a_metric_that_counts_no_question_is_left_out(length, files, tmp_path):
    gt = json.loads((files / "test.json").read_text())[4:]
    (files / "closed.json").write_text(json.dumps(gt))
    flags = ["--gt", str(files / "closed.json"), "--pred", str(files / "a.jsonl")]
    with pytest.raises(LlavaError, match="4 unknown"):
        run_eval.main(flags)
    (files / "one.jsonl").write_text(json.dumps({"question_id": 4, "text": "left"}))
    flags = ["--gt", str(files / "closed.json"), "--pred", str(files / "one.jsonl")]
    run_eval.main([*flags, "--output", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert "open length" not in content["further"] and content["strict"]["open recall"]["value"] is None


def test_a_package_that_is_missing_is_named(length, files):
    @metric("open length", counts=OPEN)
    def needy(answer: Answer) -> float:
        import no_such_package_of_metrics.inner

        return no_such_package_of_metrics.inner.score(answer)

    made = next(m for m in all_metrics() if m.name == "open length")
    made = dataclasses.replace(made, function=needy)
    with pytest.raises(LlavaError, match='"open length" needs the package "no_such_package_of_metrics"; install it'):
        made.values([Answer("a", "b", OPEN)])


def test_two_metrics_of_one_name_are_refused(length):
    code = compile("def other(answer):\n    return 0.0\n", "another.py", "exec")
    scope = {"__name__": "another"}
    exec(code, scope)
    with pytest.raises(ValueError, match="two metrics are called 'open length'"):
        metric("open length", counts=OPEN)(scope["other"])


def test_the_fixed_sets_are_what_docs_say():
    names = {name: [m.name for m in all_metrics() if m.metric_set == name] for name in ("paper", "strict")}
    assert len(names["paper"]) == 11 and len(names["strict"]) == 6
    assert [m.title for m in all_metrics() if m.is_headline][:4] == [
        "paper open",
        "paper closed",
        "strict open",
        "strict closed",
    ]
