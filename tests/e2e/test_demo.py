"""The demo at its smallest size, through the real commands as processes."""

import json
import re
import subprocess
import sys

import pytest

from llava.constants import RESEARCH_NOTICE
from llava.records import read_records
from tests import test_pages as pages
from tests.documented_commands import ROOT
from tests.openai_server import OpenAIServer

browser, text_of = pages.browser, pages.text_of


def _python(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=540)


def _demo(output) -> subprocess.CompletedProcess:
    return _python("llava.demo", "--small", "--seed", "4", "--output-dir", output)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    return output, _demo(output)


def test_a_small_demo_ends_with_results_and_a_page_and_claims_no_score(demo):
    output, done = demo
    assert done.returncode == 0, done.stderr
    assert "no score is given" in done.stdout and "%" not in done.stdout
    assert f"report: {output / 'report.html'}" in done.stdout and "research only" in done.stdout
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {"questions", "seconds", "seed"} and results["seed"] == 4 and results["questions"] > 80
    assert len(list((output / "data" / "images").glob("t*_*.png"))) == 500
    page = (output / "report.html").read_text()
    assert "no score is given" in page and "<img" in page and "data:image/jpeg;base64" in page
    assert "research only" in page and page.count("<svg ") == page.count("<figcaption>") >= 5
    assert 'src="http' not in page and "<script" not in page


def test_what_the_script_for_a_cpu_begins_with_is_there(demo):
    output, _ = demo
    script = (ROOT / "scripts" / "cpu.sh").read_text()
    named = re.findall(r":=runs/demo/(\S+)}", script)
    assert len(named) == 3 and all((output / name).exists() for name in named)


def test_scores_of_a_whole_demo_are_shown(demo, browser):
    """Those of the small run, shown as the whole one shows its own, in Chromium at 500 px."""
    from llava.demo.report import write_report
    from llava.demo.scores import results, score_runs, table

    output, _ = demo
    scores = score_runs(output)
    summary = results(scores, scores[""].finding.questions, 1.0, 4)
    metrics = {f"{run}{metric}" for run in ("", "blind_", "nearest_") for metric in ("closed_accuracy", "open_recall")}
    assert metrics < set(summary)
    assert [row[0] for row in table(scores)][1:] and "with images" in str(table(scores))
    page = (output / "report.html").read_bytes()
    shown = write_report(output, scores, summary, {"scores": 1.0}, claims_scores=True).read_text()
    text = text_of(browser, output / "report.html")
    (output / "report.html").write_bytes(page)
    assert all(" ".join(cell.split()) in text for row in table(scores) for cell in row)
    assert RESEARCH_NOTICE in text and '"seed": 4' in text
    assert "95 % bootstrap intervals" in shown and shown.count("<svg ") == shown.count("<figcaption>") >= 7


def test_demo_leaves_a_whole_model_whose_tower_stayed_as_it_was(demo):
    from llava.model import load_pretrained_model

    output, _ = demo
    models = [load_pretrained_model(output / name, device="cpu").model for name in ("stage_1", "vqa")]
    states = [model.state_dict() for model in models]
    changed = {name for name in states[0] if not states[0][name].equal(states[1][name])}
    assert changed and not any("vision_tower" in name for name in changed)
    assert models[1].config.conversation_template == "mistral_instruct"


def test_blind_run_never_saw_a_image_and_trained_as_long(demo):
    output, _ = demo
    for stage in ("stage_1", "stage_2", "vqa"):
        seeing, blind = (
            json.loads((output / f"{p}{stage}" / "trainer_state.json").read_text()) for p in ("", "blind_")
        )
        assert seeing["max_steps"] == blind["max_steps"] > 0
    records = json.loads((output / "data" / "grey" / "vqa_train.json").read_text())
    assert {record["image"] for record in records} == {"grey.png"}


def test_a_rerun_does_nothing_again(demo):
    output, _ = demo
    before = {path: path.stat().st_mtime_ns for path in (output / "vqa").iterdir()}
    again = _demo(output)
    assert again.returncode == 0 and again.stderr.count("done before") == 9
    assert {path: path.stat().st_mtime_ns for path in (output / "vqa").iterdir()} == before


def test_its_model_answers_the_chat_questions_and_is_judged(demo, shared_dir, tmp_path):
    """The whole chain of the chat evaluation; its images are not released, so drawn ones stand in."""
    questions = shared_dir / "llava_med_eval" / "llava_med_eval_qa50_qa.jsonl"
    if not questions.is_file():
        pytest.skip(f"no chat-evaluation questions at {questions}")
    output, _ = demo
    (tmp_path / "images").mkdir()
    drawn = sorted((output / "data" / "images").glob("test_*.png"))
    names = dict.fromkeys(record["image"] for record in read_records(questions))
    for number, name in enumerate(names):
        (tmp_path / "images" / name).write_bytes(drawn[number % len(drawn)].read_bytes())
    files = [tmp_path / name for name in ("answers.jsonl", "scores.jsonl", "summary.json")]
    words = ["--model-path", output / "vqa", "--question-file", questions, "--image-folder", tmp_path / "images"]
    answered = _python("llava.eval.model_vqa", *words, "--answers-file", files[0], "--max_new_tokens", 8)
    assert answered.returncode == 0, answered.stderr
    words = ["--question_input_path", questions, "--input_path", files[0], "--output_path", files[1]]
    with OpenAIServer("--mode", "judge") as server:
        words += ["--api-model", "m", "--api-base", server.url]
        scored = _python("llava.eval.eval_multimodal_chat_gpt_score", *words)
    assert scored.returncode == 0, scored.stderr
    summarised = _python("llava.eval.summarize_gpt_review", "--scores-file", files[1], "--json", files[2])
    assert summarised.returncode == 0, summarised.stderr
    sizes = {name: group["data_size"] for name, group in json.loads(files[2].read_text())[0]["groups"].items()}
    assert (sizes["conversation"], sizes["detailed_description"], sizes["overall"]) == (143, 50, 193)
    assert [sizes[name] for name in ("chest_xray", "mri", "histology", "gross", "ct_scan")] == [37, 38, 44, 34, 40]
