"""The pages that commands write, in Chromium: at 500 px, light and dark, without errors, requests, scroll bars."""

import json

from llava.constants import RESEARCH_NOTICE
from llava.data.stats_count import collect
from llava.data.stats_figure import write_figures
from llava.eval import run_eval
from llava.records import write_json
from tests import test_pages as pages
from tests.eval import test_report as reports
from tests.train import test_summary as trainings

files, browser = reports.files, pages.browser


def test_a_report_shows_the_scores_of_run_eval(files, browser, tmp_path):
    reports.make(files, "--image-folder", str(files))
    scores = tmp_path / "scores.json"
    words = [
        "--gt",
        files / "test.json",
        "--pred",
        files / "seen.jsonl",
        "--output",
        scores,
        "--bootstrap-samples",
        "200",
    ]
    run_eval.main([str(word) for word in words])
    strict, text = json.loads(scores.read_text())["strict"], pages.text_of(browser, files / "page.html")
    for name in ("open recall", "closed accuracy"):
        assert f"{strict[name]['value']:.1f}" in text, name
    assert RESEARCH_NOTICE in text


def test_a_training_page_shows_its_summary(browser, tmp_path):
    _, summary = trainings.run(tmp_path)
    text = pages.text_of(browser, tmp_path / "training_report.html")
    assert f"{summary['first_loss']:.4f}" in text and f"{summary['last_loss']:.4f}" in text


def test_a_page_of_statistics_shows_its_counts(browser, tmp_path):
    turns = [{"from": "human", "value": "Describe the image."}, {"from": "gpt", "value": "It shows a lung."}]
    write_json(tmp_path / "data.json", [{"id": str(n), "conversations": turns} for n in range(3)])
    stats = collect(tmp_path / "data.json")
    text = pages.text_of(browser, write_figures(stats, tmp_path, "Records", {"input": "data.json"}))
    assert '"input": "data.json"' in text
    assert f"{stats.records:,} records" in text
