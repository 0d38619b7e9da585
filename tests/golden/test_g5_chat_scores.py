"""Golden G5: score lines are parsed, and chat evaluations summed up, as published; unreadable rows are left out.

The published summaries average failed parses (−1) in, or crash on them: there ours counts them, leaves them out,
and equals the same summary of the readable rows.
"""

import json
import math

import pytest

from llava.eval.chat.scores import OVERALL, is_usable, judge_reply, parse_scores, summarize_chat
from tests.conftest import golden_cases

TOLERANCE = 1e-9


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers_of(group):
    return {key: getattr(group, key) for key in ("gpt4_score", "pred_score", "pred_relative_score", "data_size")}


@pytest.mark.parametrize("case", golden_cases("G5_metrics/parse_score"))
def test_score_lines_parse_as_published(case):
    rows = read(case / "cases.json")
    assert rows
    for row in rows:
        for got, expected in zip(parse_scores(row["review"]), row["tuple"], strict=True):
            expected = float(expected)
            assert got == expected or (math.isnan(got) and math.isnan(expected)), row["review"]


@pytest.mark.parametrize("case", golden_cases("G5_metrics/summarize_chat_eval"))
def test_chat_summaries_are_the_published_ones(case):
    results = read(case / "results.json")
    assert results
    for name, golden in results.items():
        rows = read_lines(case / f"scores_{name}.jsonl")
        summary = summarize_chat(rows)
        usable = [row for row in rows if is_usable(parse_scores(judge_reply(row)))]
        assert summary.unreadable + summary.zero_reference == len(rows) - len(usable)
        expected = golden["v1.5 numbers"]
        if "error" in expected:
            # What the script can't read is left out; only a plain "8,9" is readable for ours and not for it.
            assert summary.groups == summarize_chat(usable).groups
            assert summary.groups["overall"].data_size == len(usable)
            continue
        assert {key: numbers_of(group) for key, group in summary.groups.items()} == {
            key: pytest.approx(value, abs=TOLERANCE) for key, value in expected.items()
        }
        old = {"overall" if key == "all" else key: v for key, v in golden["v1.0.0 ChatEvaluation.eval"].items()}
        without_domain = old.pop("null", None)
        assert summary.without_domain == (without_domain or {"data_size": 0})["data_size"]
        for key, value in old.items():
            assert numbers_of(summary.groups[key]) == pytest.approx(value, abs=TOLERANCE)


SUMMARIES = {
    "v1.0.0": ("v1.0", None, ()),
    "haotian_main -d reviews": ("llava", None, ()),
    "haotian_main -d reviews -v 0613": ("llava", "0613", ()),
    "haotian_main -d reviews -i 3 5": ("llava", None, (3, 5)),
}


def as_chat(rows):
    """LLaVA's reviews under this project's keys."""
    names = {"category": "type", "tuple": "scores"}
    return [{names.get(key, key): value for key, value in {"tuple": None, **row}.items()} for row in rows]


def published_lines(summary, usable, style):
    """As the scripts print them: "llava" (sorted, means x 10) or "v1.0" (in order of appearance, means in brackets)."""
    groups = {"all" if name == OVERALL else name: group for name, group in summary.groups.items()}
    order = dict.fromkeys(name for row in usable for name in (row.get("category"), "all") if name in groups)
    for name in order if style == "v1.0" else sorted(order):
        first, second = (round(mean, 3) for mean in (groups[name].gpt4_score, groups[name].pred_score))
        ratio = round(second / first * 100, 1)
        yield (
            f"{name} {[first, second]} {ratio}"
            if style == "v1.0"
            else f"{name} {ratio} {round(first * 10, 1)} {round(second * 10, 1)}"
        )


@pytest.mark.parametrize("case", golden_cases("G5_metrics/summarize_gpt_review"))
def test_review_summaries_print_what_is_published(case):
    results = read(case / "results.json")
    files = {path.stem.removeprefix("gpt4_text_"): read_lines(path) for path in sorted((case / "reviews").glob("*"))}
    assert files and results
    for name, golden in results.items():
        style, version, ignore = SUMMARIES[name]
        blocks, all_usable = [], True
        for model, rows in files.items():
            if version and version not in model:
                continue
            rows = [row for row in rows if row["question_id"] not in ignore]
            usable = [row for row in rows if is_usable(row.get("tuple") or ())]
            summary = summarize_chat(as_chat(rows))
            assert len(summary.left_out_ids) == len(rows) - len(usable)
            assert summary.groups == summarize_chat(as_chat(usable)).groups
            header = f"GPT-4 vs. {model}" if style == "v1.0" else model
            blocks.append("\n".join([header, *published_lines(summary, usable, style), "=" * 33]) + "\n")
            if summary.left_out_ids:
                # Failed parses are averaged in there, and a row without "tuple" or "category" ends it
                all_usable = False
                assert blocks[-1] not in golden["stdout"]
            elif golden["error"] is None:
                assert blocks[-1] in golden["stdout"]
        if all_usable and golden["error"] is None:
            assert "".join(blocks) == golden["stdout"]
