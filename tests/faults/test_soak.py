"""The soak in small: all its kinds of requests and faults at once. `make soak` is the hour of it."""

import json
import subprocess
import sys

import pytest

from llava.serve.protocol import ErrorType
from llava.serve.web.page import MOST_SESSIONS
from tests.faults.soak.__main__ import FILLING
from tests.faults.soak.figures import answers, memory, missed, wrong_in
from tests.faults.soak.load import Request
from tests.faults.soak.stack import Sample


@pytest.mark.long
def test_a_minute_of_it(tmp_path):
    words = ["--minutes", "1.5", "--fault-seconds", "8", "--seed", "3"]
    words += ["--json", str(tmp_path / "soak.json"), "--log", str(tmp_path / "log")]
    done = subprocess.run([sys.executable, "-m", "tests.faults.soak", *words], capture_output=True, text=True)
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert done.returncode == 0 and figures["missed"] == [], done.stderr[-2000:]
    assert json.loads(done.stdout) == figures and "requests" in done.stderr
    assert sum(figures["faults"].values()) >= 8
    filled = figures["filled_before_the_load"]
    assert filled["requests"]["page conversation"] > 0 and filled["is_full"] == (filled["requests"] == filled["of"])
    assert all(kind["as it has to be"] > 0 for kind in figures["requests"].values()) and len(figures["requests"]) == 9


def request(lost=None, asked=0.0, ended=1.0, is_refused=False):
    return Request("text", is_refused, asked, ended, lost, 0)


def test_only_what_a_killed_worker_was_answering_is_excepted():
    lost = ErrorType.WORKER_LOST.value
    during, later, other = request(lost, 4, 6), request(lost, 6, 7), request("no_worker", 4, 6)
    figures = answers([request()] * 997 + [during, later, other], kills=[5.0])
    assert figures["in_flight_on_a_killed_worker"] == 1
    assert figures["answered_share"] == round(997 / 999, 6)


def test_what_grows_after_it_has_settled_is_seen():
    """Warming up isn't growing; a process that was started anew counts by its longest life."""
    life = [Sample("api", 1, 10.0 * n, 100 + min(n, 30), 100 + n, 5) for n in range(120)]
    other = [Sample("api", 2, 10.0 * n, 1, 1, 5) for n in range(5)]
    # Bodies on their way come and go: in the end they are there in nine of ten moments.
    busy = [Sample("page", 3, 10.0 * n, 100 + 90 * (n % 10 < n // 12), 100, 5) for n in range(120)]
    assert memory(busy)["page"]["rss_growth"] == 0.0
    figures = memory(life + other)["api"]
    assert figures["is_judged"] and figures["seconds"] == 1190
    assert figures["rss_growth"] == 0.0 and figures["pss_growth"] > 0.4
    assert figures["baseline_seconds"] == [400, 490]


def test_before_the_load_the_page_gets_more_visitors_than_it_remembers():
    assert FILLING["page conversation"] > MOST_SESSIONS


GOOD = {
    "answered_share": 1.0,
    "refused_otherwise": {},
    "faults_wrong": {},
    "health_not_answered": {},
    "wrong_in_the_logs": {},
    "memory": {"api": {"is_judged": True, "rss_growth": 0.0}},
    "files": {"api": {"before": 10, "after": 12}},
    "exit_code": 0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"answered_share": 0.9989},
        {"refused_otherwise": {"500 internal_error": 1}},
        {"faults_wrong": {"garbage": 1}},
        {"health_not_answered": {"api": 1}},
        {"wrong_in_the_logs": {"KeyError": 1}},
        {"memory": {"api": {"is_judged": True, "rss_growth": 0.02}}},
        {"files": {"api": {"before": 10, "after": 14}}},
        {"exit_code": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_aim_can_be_missed(change):
    assert missed(GOOD) == [] and len(missed(GOOD | change)) == 1


def test_what_a_log_says_is_found():
    log = "INFO x\n  Traceback (most recent call last):\n    File y\n  KeyError: 'a'\nINFO z\n"
    assert wrong_in(log * 2) == {"KeyError: 'a'": 2} and wrong_in("INFO x\n") == {}
