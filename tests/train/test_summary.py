"""The page of a training run says what the JSON beside it says."""

import json
import re
from types import SimpleNamespace

import pytest

from llava.records import write_records
from llava.train.output.summary import add_losses, write_summary
from llava.train.progress import MOST_LOGGING_STEPS, LogInterval
from llava.train.train import train
from tests.tiny import make_llava
from tests.train.helpers import flags, losses, make_records

COUNTED = {"count": 0, "first": []}


def run(folder, steps=60, evaluations=6, **more):
    """A run's logs, its summary and the answers that it left."""
    logs = []
    for step in range(1, steps + 1):
        logs.append({"step": step, "loss": 2 - step / steps, "learning_rate": 1e-4, "tokens_per_second": 100.0})
        if step % (steps // evaluations) == 0:
            logs.append({"step": step, "eval_loss": 2.5 - step / steps, "eval_runtime": 3.0})
            answers = [
                {"question_id": n, "question": f"question {n}", "reference": "no", "text": f"{n} at {step}"}
                for n in range(12)
            ]
            (folder / "eval_answers").mkdir(parents=True, exist_ok=True)
            write_records(folder / "eval_answers" / f"step-{step}.jsonl", answers)
    summary = {
        **{"steps": steps, "samples": 7, "seconds": 1.5, "peak_memory_mb": 99.0, "parameters": 1000, "processes": 1},
        **{"trainable_parameters": 10, "samples_per_step": 2, "data_wait": 0.125, "mfu": None},
        "truncated": {"count": 3, "first": ["record 1", "<b>"]},
        "validation": {"data_path": "held_out.json", "samples": 5, "best_step": 40, "left_out": COUNTED},
        **more,
    }
    summary = add_losses(summary, logs)
    write_summary(folder, summary, logs)
    return (folder / "training_report.html").read_text(), json.loads((folder / "training_summary.json").read_text())


def test_the_page_has_the_numbers_of_the_summary(tmp_path):
    page, summary = run(tmp_path)
    for what in ("first", "last"):
        assert re.search(rf"loss of the {what} step<[^0-9]*{summary[f'{what}_loss']:.4f}<", page)
    assert "12.5%" in page
    assert page.count("<figure") == 3 and "MFU" not in page
    assert "training, smoothed from" in page and "held-out from 2.33 to 1.5" in page
    for measured in summary["validation"]["curve"]:
        assert f">{measured['loss']:g}</td>" in page
    assert "that of step 40" in page and "where it was resumed" not in page


def test_a_resumed_run_says_what_is_counted_from_there(tmp_path):
    page, _ = run(tmp_path, resumed_from="somewhere/checkpoint-24")
    assert "since checkpoint-24, where it was resumed" in page


def test_answers_are_shown_from_the_first_evaluation_to_the_last(tmp_path):
    page, _ = run(tmp_path)
    assert [f"step {step}<" in page for step in (10, 20, 30, 40, 50, 60)] == [True, False, True, True, False, True]
    assert "7 at 10<" in page and "7 at 60<" in page and "8 at 60<" not in page
    assert "8 of 12 questions, 4 of 6 evaluations" in page


def test_what_was_cut_is_named(tmp_path):
    page, _ = run(tmp_path)
    assert "training records cut at the length limit" in page and "record 1, &lt;b&gt;" in page
    assert "held-out records" not in page.partition("Cut or left out</h2>")[2]


@pytest.mark.parametrize(("steps", "every"), [(3, 1), (120, 2), (100_000, 500)])
def test_short_runs_log_enough_for_a_curve(steps, every):
    args = SimpleNamespace(logs_by_length=True, logging_steps=MOST_LOGGING_STEPS)
    state = SimpleNamespace(max_steps=steps, logging_steps=500)
    LogInterval().on_train_begin(args, state, None)
    assert state.logging_steps == every


def test_every_step_of_a_short_run_is_logged_unless_told_otherwise(tmp_path):
    base, data = make_llava(tmp_path / "base"), make_records(tmp_path / "data")
    words = flags(tmp_path / "out", data, base, "--max_steps", "4")
    place = words.index("--logging_steps")
    del words[place : place + 2]
    train(words)
    assert len(losses(tmp_path / "out")) == 4
    train([*flags(tmp_path / "two", data, base, "--max_steps", "4"), "--logging_steps", "2"])
    assert len(losses(tmp_path / "two")) == 2
