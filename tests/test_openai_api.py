"""The API client against a real server that fails: every item once, in order, and nothing paid twice."""

import asyncio
import json
import signal
import subprocess
import sys
import time

import pytest

from llava.errors import LlavaError
from llava.openai_api import (
    ApiSettings,
    ChatJob,
    describe_dry_run,
    run_jobs,
    settings_from_args,
)
from llava.openai_client.limits import Account, RateGate, estimate_tokens
from llava.records import read_records
from llava.resumable import ResumableJsonl
from tests.openai_server import OpenAIServer
from tests.skipping_loop import run_skipping
from tests.test_openai_settings import parsed

pytest.importorskip("openai", reason='the openai package is in the extra "openai"')


def jobs(count, text="item {}"):
    return [ChatJob(n, [{"role": "user", "content": text.format(n)}]) for n in range(count)]


def settings(server, **changes):
    values = {"model": "m", "api_key": "secret-key", "base_url": server.url, "concurrency": 32, "timeout": 2.0}
    return ApiSettings(**{**values, "backoff": 0.02, **changes})


def record(job, result):
    return {"question_id": job.key, "text": result.text, "refused": result.refused}


def ask(items, config, path, **more):
    with ResumableJsonl(path) as output:
        summary = run_jobs(items, config, output, record, **more)
        if summary.complete:
            output.finish([job.key for job in items])
    return summary


def test_a_thousand_items_with_a_fifth_failing(tmp_path):
    with OpenAIServer("--faults", "0.2", "--kinds", "429,500,cut,malformed,empty") as server:
        summary = ask(jobs(1000), settings(server), tmp_path / "out.jsonl")
        stats = server.stats()
    rows = read_records(tmp_path / "out.jsonl")
    assert [row["question_id"] for row in rows] == list(range(1000))
    assert all(row["text"] == f"answer to item {n}" for n, row in enumerate(rows))
    assert 150 < len(stats["faulted"]) < 250, "the faults were not injected"
    assert sum(stats["requests"].values()) == 1000 + sum(stats["faulted"].values()) == summary.account.requests
    assert stats["peak"] <= 32
    # Empty answers are paid for too.
    assert 5 * 1000 < summary.account.completion_tokens < 5 * (1000 + sum(stats["faulted"].values()))


def test_timeouts_are_asked_again(tmp_path):
    with OpenAIServer("--faults", "1", "--kinds", "timeout") as server:
        summary = ask(jobs(20), settings(server, timeout=0.3), tmp_path / "out.jsonl")
        assert summary.complete
        assert summary.retries == 20
        assert set(server.stats()["requests"].values()) == {2}


def test_an_item_that_keeps_failing_is_reported_and_asked_again_next_time(tmp_path):
    path = tmp_path / "out.jsonl"
    with OpenAIServer("--faults", "0.3", "--kinds", "500", "--faults-per-item", "3") as server:
        summary = ask(jobs(30), settings(server, max_retries=2), path)
        assert summary.failed
        assert not path.exists()
        assert all("HTTP 500" in reason for reason in summary.failed.values())
        again = ask(jobs(30), settings(server, max_retries=2), path)
    assert again.resumed == 30 - len(summary.failed)
    assert [row["question_id"] for row in read_records(path)] == list(range(30))


def test_a_server_that_is_down_ends_the_run(tmp_path):
    """All items had all their tries: an hour for 200 of them, three times over."""
    path = tmp_path / "out.jsonl"
    items = jobs(200)
    with OpenAIServer() as server:
        config = settings(server, concurrency=4, max_retries=1)
        assert ask(items[:3], config, path).done == 3
        path.rename(f"{path}.part")
    with pytest.raises(LlavaError, match=r"8 items in a row couldn't be asked \(connection failed.*is the server up\?"):
        ask(items, config, path)
    assert config.account.requests < 3 + 2 * (8 + 4)
    assert len(read_records(f"{path}.part")) == 3


def test_killed_and_resumed_nothing_is_asked_twice_but_what_was_in_flight(tmp_path):
    path, count, concurrency, kills = tmp_path / "out.jsonl", 400, 8, 0
    script = (
        "import sys\n"
        "from tests.test_openai_api import *\n"
        "class Server: url = sys.argv[1]\n"
        f"ask(jobs({count}), settings(Server, concurrency={concurrency}), sys.argv[2])\n"
    )
    with OpenAIServer("--delay", "0.02", "--faults", "0.2", "--kinds", "429,500,cut") as server:
        while not path.exists():
            process = subprocess.Popen([sys.executable, "-c", script, server.url, str(path)])
            while process.poll() is None and kills < 4:
                before = sum(server.stats()["answered"].values())
                deadline = time.monotonic() + 60
                while process.poll() is None and time.monotonic() < deadline:
                    if sum(server.stats()["answered"].values()) > before + 50 + 17 * kills:
                        process.send_signal(signal.SIGKILL)
                        kills += 1
                        break
                    time.sleep(0.01)
            process.wait()
        stats = server.stats()
    assert kills == 4
    assert [row["question_id"] for row in read_records(path)] == list(range(count))
    asked_again = sum(stats["requests"].values()) - count - sum(stats["faulted"].values())
    assert 0 <= asked_again <= kills * concurrency


def test_wrong_key_stops_at_once_and_is_not_shown(tmp_path):
    with OpenAIServer("--key", "right") as server:
        with pytest.raises(LlavaError, match="API key") as error:
            ask(jobs(50), settings(server, concurrency=4), tmp_path / "out.jsonl")
        assert sum(server.stats()["requests"].values()) == 0
    assert "secret-key" not in str(error.value)
    assert "secret-key" not in repr(settings(server))


def test_refused_content_is_an_answer_and_a_bad_request_a_failure(tmp_path):
    with OpenAIServer() as server:
        summary = ask(jobs(3, "FORBIDDEN {}"), settings(server), tmp_path / "a.jsonl")
        assert (summary.done, summary.refused) == (3, 3)
        summary = ask(jobs(3, "INVALID {}"), settings(server), tmp_path / "b.jsonl")
        assert len(summary.failed) == 3
        assert set(server.stats()["requests"].values()) == {1}, "what can't succeed was asked again"


def test_follow_up_is_asked_once(tmp_path):
    def repair(job, result):
        return ChatJob(job.key, [{"role": "user", "content": f"again {job.key}"}]) if job.key % 2 else None

    with OpenAIServer() as server:
        ask(jobs(10), settings(server), tmp_path / "out.jsonl", follow_up=repair)
    texts = [row["text"] for row in read_records(tmp_path / "out.jsonl")]
    assert texts[:2] == ["answer to item 0", "answer to again 1"]


@pytest.mark.parametrize("second", ["INVALID", "SPENT", "FORBIDDEN"])
def test_where_the_follow_up_fails_the_first_reply_stands(tmp_path, second):
    def repair(job, result):
        return ChatJob(job.key, [{"role": "user", "content": f"{second} {job.key}"}]) if job.key % 2 else None

    with OpenAIServer() as server:
        summary = ask(jobs(10), settings(server), tmp_path / "out.jsonl", follow_up=repair)
        assert sum(server.stats()["requests"].values()) == 15
    rows = read_records(tmp_path / "out.jsonl")
    assert [(row["text"], row["refused"]) for row in rows] == [(f"answer to item {n}", None) for n in range(10)]
    assert summary.complete and (summary.done, summary.refused, summary.first_kept) == (10, 0, 5)
    assert "5 first replies kept as they are" in str(summary)


def test_cost_limit_holds(tmp_path):
    path = tmp_path / "out.jsonl"
    config = {"price_in": 1e3, "price_out": 1e3, "concurrency": 4}
    items = [ChatJob(n, [{"role": "user", "content": f"item {n}"}], max_tokens=5) for n in range(100)]
    with OpenAIServer() as server:
        summary = ask(items, settings(server, max_cost=0.5, **config), path)
        assert 0 < summary.account.spent <= 0.5
        assert summary.over_budget == 100 - summary.done > 0
        assert not path.exists()
        assert "cost limit" in str(summary)
        assert ask(items, settings(server, **config), path).complete
        assert set(server.stats()["requests"].values()) == {1}


def test_the_cost_limit_is_one_for_all_runs_with_the_same_settings(tmp_path):
    """Each round of instruct_generate, and each 512 answers, had the whole limit for itself."""
    items = [ChatJob(n, [{"role": "user", "content": f"item {n}"}], max_tokens=5) for n in range(100)]
    with OpenAIServer() as server:
        config = settings(server, max_cost=0.5, price_in=1e3, price_out=1e3, concurrency=4)
        first = ask(items, config, tmp_path / "out.jsonl")
        done, spent, requests = first.done, first.account.spent, first.account.requests
        second = ask(items, config, tmp_path / "out.jsonl")
    assert first.over_budget and second.over_budget
    assert second.resumed == done and second.done < done / 2
    assert spent <= second.account.spent <= 0.5 and requests <= second.account.requests


@pytest.mark.parametrize("batch", [False, True])
def test_answers_that_are_empty_are_paid_for(tmp_path, batch):
    config = {"price_in": 0.0, "price_out": 2e5 if batch else 1e5, "batch_api": batch, "poll_seconds": 0.01}
    items = [ChatJob(n, [{"role": "user", "content": f"SPENT {n}"}], max_tokens=5) for n in range(6)]
    with OpenAIServer() as server:
        summary = ask(items, settings(server, **config), tmp_path / "out.jsonl")
        assert set(server.stats()["requests"].values()) == (set() if batch else {1}), "asked again in vain"
        assert summary.account.spent == pytest.approx(3.0) and summary.account.completion_tokens == 30
        assert all("spent before it began" in reason for reason in summary.failed.values()) and len(summary.failed) == 6
        if not batch:
            limited = ask(items, settings(server, max_cost=1.0, concurrency=1, **config), tmp_path / "b.jsonl")
            assert limited.account.spent == pytest.approx(1.0) and limited.over_budget == 4


def test_a_model_without_temperature_and_max_tokens(tmp_path):
    items = [ChatJob(n, [{"role": "user", "content": f"item {n}"}], max_tokens=9) for n in range(5)]
    with OpenAIServer("--mode", "reasoning") as server:
        with pytest.raises(LlavaError, match=r"'max_tokens' is not supported.*; give --reasoning-model"):
            ask(items, settings(server), tmp_path / "a.jsonl")
        summary = ask(items, settings(server, batch_api=True, poll_seconds=0.01), tmp_path / "b.jsonl")
        assert len(summary.failed) == 5 and "give --reasoning-model" in str(summary)
        for batch in (False, True):
            config = settings(server, reasoning_model=True, batch_api=batch, poll_seconds=0.01)
            assert ask(items, config, tmp_path / f"c{batch}.jsonl").done == 5
    assert settings_from_args(parsed("--api-model", "x", "--reasoning-model"), {"OPENAI_API_KEY": "k"}).reasoning_model
    assert items[0].body("m", reasoning=True)["max_completion_tokens"] == 9


def test_cost_limit_without_prices_is_refused(tmp_path):
    with pytest.raises(LlavaError, match="--price-in"):
        Account(limit=3.0)


def test_batch_api(tmp_path):
    path = tmp_path / "out.jsonl"
    with OpenAIServer("--polls", "3") as server:
        items = jobs(20) + [ChatJob("bad", [{"role": "user", "content": "INVALID"}])]
        summary = ask(items, settings(server, batch_api=True, poll_seconds=0.01, price_in=2.0, price_out=2.0), path)
    assert summary.done == 20
    assert list(summary.failed) == ["bad"]
    assert summary.account.price_in == 1.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl.part"]


def test_what_a_batch_would_ask_again_is_counted(tmp_path):
    config = {"batch_api": True, "poll_seconds": 0.01}
    with OpenAIServer("--polls", "1") as server:
        again = {"follow_up": lambda job, result: job if job.key % 2 else None}
        summary = ask(jobs(10), settings(server, **config), tmp_path / "out.jsonl", **again)
    assert (summary.done, summary.first_kept) == (10, 5) and "5 first replies kept as they are" in str(summary)


def test_an_answer_of_a_batch_has_at_most_the_bytes_of_a_reply(tmp_path, monkeypatch):
    monkeypatch.setattr("llava.openai_client.batch.MOST_REPLY", 100)
    with (
        OpenAIServer("--polls", "1") as server,
        pytest.raises(LlavaError, match=r"can't be read.*larger than 100 bytes"),
    ):
        ask(jobs(1), settings(server, batch_api=True, poll_seconds=0.01), tmp_path / "out.jsonl")


def test_an_answer_of_a_batch_may_hold_other_ends_of_lines(tmp_path):
    asked = "one\u2028two\x85three"
    with OpenAIServer("--polls", "1") as server:
        jobs = [ChatJob("a", [{"role": "user", "content": asked}])]
        ask(jobs, settings(server, batch_api=True, poll_seconds=0.01), tmp_path / "out.jsonl")
    assert [row["text"] for row in read_records(tmp_path / "out.jsonl")] == [f"answer to {asked}"]


def test_a_killed_batch_is_waited_for_not_submitted_again(tmp_path):
    path = tmp_path / "out.jsonl"
    script = (
        "import sys\nfrom tests.test_openai_api import *\nclass Server: url = sys.argv[1]\n"
        "ask(jobs(5), settings(Server, batch_api=True, poll_seconds=float(sys.argv[3])), sys.argv[2])\n"
    )
    state = tmp_path / "out.jsonl.batch.json"
    with OpenAIServer("--polls", "2") as server:
        process = subprocess.Popen([sys.executable, "-c", script, server.url, str(path), "60"])
        deadline = time.monotonic() + 60
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert json.loads(state.read_text())["id"] == "batch-0"
        ask(jobs(5), settings(server, batch_api=True, poll_seconds=0.01), path)
    assert len(read_records(path)) == 5
    assert not state.exists()


def test_a_batch_is_waited_for_though_the_server_fails(tmp_path):
    with OpenAIServer("--polls", "3", "--poll-faults", "2") as server:
        assert ask(jobs(5), settings(server, batch_api=True, poll_seconds=0.01), tmp_path / "out.jsonl").done == 5


def test_a_server_that_takes_no_batch_is_one_line(tmp_path):
    path = tmp_path / "out.jsonl"
    with (
        OpenAIServer("--key", "another") as server,
        pytest.raises(LlavaError, match=r"wrong key.*no batch was submitted$"),
    ):
        ask(jobs(5), settings(server, batch_api=True), path)
    with OpenAIServer("--poll-faults", "100") as server:
        config = settings(server, batch_api=True, poll_seconds=0.01, max_retries=1)
        with pytest.raises(LlavaError, match=r"busy.*out\.jsonl\.batch\.json is asked for again$"):
            ask(jobs(5), config, path)
    assert json.loads((tmp_path / "out.jsonl.batch.json").read_text())["id"] == "batch-0"


def test_azure(tmp_path):
    with OpenAIServer("--key", "azure-key") as server:
        config = ApiSettings(
            model="deployment",
            api_key="azure-key",
            azure_endpoint=server.url.removesuffix("/v1"),
            api_version="2024-06-01",
        )
        assert ask(jobs(3), config, tmp_path / "out.jsonl").done == 3


def test_dry_run_shows_the_first_prompt_and_the_cost():
    config = ApiSettings(model="gpt-4o", api_key="k")
    text = describe_dry_run(jobs(1000, "look at item {} please"), config)
    assert "look at item 0 please" in text
    assert "USD" in text
    assert "1,000 requests" in text


def test_images_count_as_tokens():
    content = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "data:x"}}]
    assert estimate_tokens([{"role": "user", "content": content}]) > 500


def passing_times(gate, sizes, pauses=()):
    """When requests of these sizes pass, all asked for at once: seconds of a clock that never waits."""
    times = {}

    async def one(number, size):
        await gate.acquire(size)
        times[number] = asyncio.get_running_loop().time()
        for seconds in [seconds for after, seconds in pauses if after == number]:
            gate.pause(seconds)

    async def ask():
        await asyncio.gather(*(one(number, size) for number, size in enumerate(sizes)))

    run_skipping(ask())
    return [times[number] for number in range(len(sizes))]


def most_within(times, weights, seconds):
    return max(
        sum(weight for time, weight in zip(times, weights) if start <= time < start + seconds) for start in times
    )


@pytest.mark.parametrize(
    ("limits", "size"), [({"requests_per_minute": 120}, 10), ({"tokens_per_minute": 1200}, 10), ({}, 10)]
)
def test_rate_gate_lets_as_much_pass_as_is_allowed_and_no_more(limits, size):
    times = passing_times(RateGate(**limits), [size] * 361)
    if not limits:
        assert times[-1] == 0
        return
    assert most_within(times, [1] * 361, 1e-6) == 20, "ten seconds' worth at once"
    assert most_within(times, [1] * 361, 60) <= 140
    assert times[-1] == pytest.approx(170, abs=1), "361 requests at 120 a minute, 20 of them at once"


def test_rate_gate_of_fewer_requests_than_one_in_ten_seconds():
    assert passing_times(RateGate(requests_per_minute=3), [1] * 4) == pytest.approx([0, 20, 40, 60])


def test_large_requests_pass_in_turn_and_one_above_the_limit_takes_a_minute():
    times = passing_times(RateGate(tokens_per_minute=600), [100, 5000, 50, 50])
    assert times == sorted(times)
    assert times[1] == pytest.approx(60, abs=1) and times[2] == pytest.approx(65, abs=1)


def test_a_pause_holds_everybody_back():
    assert passing_times(RateGate(), [1] * 4, pauses=[(1, 30.0), (1, 5.0)]) == [0, 0, 30, 30]
