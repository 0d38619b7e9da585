"""The engine as a service: requests that come and go, pieces as they are made, cancelling, a full queue."""

import threading
import time
from types import SimpleNamespace

import pytest

from llava.errors import LlavaError
from llava.generation import Answer, Engine, EngineBusy, EngineStopped, Piece, Request
from tests.generation.conftest import answer_alone, ask, assert_same, mixed_requests


@pytest.fixture
def running(llama):
    engine = Engine(llama, max_batch_size=4)
    engine.start()
    yield engine
    engine.stop(drain=False)


def test_pieces_join_to_the_answer(loaded, images):
    engine = Engine(loaded)
    for request in mixed_requests(images, max_new_tokens=30)[:6]:
        (whole,) = Engine(loaded).generate([request])
        handle = engine.submit(request)
        pieces = list(handle)
        assert "".join(piece.text for piece in pieces) == handle.answer.text == whole.text
        assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
        assert "".join(engine.stream(request)) == whole.text


def test_requests_join_a_running_batch(llama, images):
    engine = Engine(llama)
    first = engine.submit(ask("What?", [images[0]], max_new_tokens=40, ignore_eos=True))
    for _ in range(5):
        engine.scheduler.step()
    second = engine.submit(ask("Is it left?", max_new_tokens=3, ignore_eos=True))
    engine.scheduler.step()
    assert len(engine.scheduler.running) == 2
    list(second)
    assert len(second.answer.token_ids) == 3
    assert len(engine.scheduler.running) == 1
    list(first)
    expected, margins = answer_alone(
        llama, Engine(llama), ask("What?", [images[0]], max_new_tokens=40, ignore_eos=False)
    )
    assert_same(expected, margins, first.answer.token_ids[: len(expected)])


def test_many_threads(llama, running, images):
    requests = mixed_requests(images)
    found: dict[int, Answer] = {}

    def client(index):
        handle = running.submit(requests[index])
        list(handle)
        found[index] = handle.answer

    threads = [threading.Thread(target=client, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    reference = Engine(llama)
    for index, request in enumerate(requests):
        expected, margins = answer_alone(llama, reference, request)
        assert_same(expected, margins, found[index].token_ids)


def test_listener_and_generate_beside_the_service(running, images):
    news = []
    done = threading.Event()

    def listen(piece):
        news.append(piece)
        if isinstance(piece, Answer):
            done.set()

    running.submit(ask("What?", [images[0]], logprobs=1), listen)
    assert len(running.generate([ask("Hi"), ask("And this?", [images[1]])])) == 2
    assert done.wait(30)
    *pieces, answer = news
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [entry for piece in pieces for entry in piece.logprobs] == answer.logprobs


@pytest.mark.parametrize("fails_at", [Piece, Answer])
def test_a_listener_that_fails_ends_nobody_elses_answer(running, caplog, fails_at):
    def listen(news):
        if isinstance(news, fails_at):
            raise ValueError("nobody is there")

    running.submit(ask("Hi", max_new_tokens=4, ignore_eos=True), listen)
    beside = running.submit(ask("Hi", max_new_tokens=40, ignore_eos=True))
    assert "".join(piece.text for piece in beside) and beside.answer.finish_reason == "length"
    assert "the listener of request None failed" in caplog.text


def test_cancelling_frees_the_row_with_the_next_step(llama, images):
    engine = Engine(llama)
    long = {"max_new_tokens": 300, "ignore_eos": True}
    handles = [engine.submit(ask("What?", [images[index]], **long)) for index in range(3)]
    engine.scheduler.step()
    handles[0].cancel()
    waiting = engine.submit(ask("Hi", **long))
    waiting.cancel()
    engine.scheduler.step()
    assert len(engine.scheduler.running) == 2 and not engine.scheduler.waiting
    list(handles[0])
    assert handles[0].answer.finish_reason == "cancelled"
    list(waiting)
    assert waiting.answer.finish_reason == "cancelled" and waiting.answer.token_ids == []
    handles[0].cancel()  # once more does nothing
    for handle in handles[1:]:
        handle.cancel()
    engine.scheduler.step()
    assert engine.scheduler.is_idle


def test_a_stream_that_is_closed_gives_its_row_back(llama):
    engine = Engine(llama)
    stream = engine.stream(ask("Hi", max_new_tokens=300, ignore_eos=True))
    next(stream)
    assert len(engine.scheduler.running) == 1
    stream.close()
    assert engine.scheduler.is_idle


def test_a_full_queue_says_busy(llama):
    engine = Engine(llama, max_waiting=2)
    handles = [engine.submit(ask("Hi")) for _ in range(2)]
    with pytest.raises(EngineBusy, match="2 requests are waiting"):
        engine.submit(ask("Hi"))
    for handle in handles:
        list(handle)
    engine.submit(ask("Hi")).cancel()


def test_first_come_first_served(llama):
    engine = Engine(llama, max_batch_size=1)
    finished = []
    for index in range(4):
        engine.submit(ask("Hi", id=index), lambda news: isinstance(news, Answer) and finished.append(news.id))
    while not engine.scheduler.is_idle:
        engine.scheduler.step()
    assert finished == [0, 1, 2, 3]


@pytest.mark.parametrize("already_running", [False, True])
def test_a_step_that_fails_ends_what_is_underway_and_the_service_goes_on(running, monkeypatch, already_running):
    runner = running.scheduler.runner
    original = runner.run

    def fail(rows, tokens, prompts):
        if len(tokens) == already_running:
            raise RuntimeError("broken")
        return original(rows, tokens, prompts)

    monkeypatch.setattr(runner, "run", fail)
    with pytest.raises(LlavaError, match="send the request again"):
        list(running.submit(ask("Hi", max_new_tokens=50, ignore_eos=True)))
    monkeypatch.setattr(runner, "run", original)
    handle = running.submit(ask("Hi", max_new_tokens=5, ignore_eos=True))
    list(handle)
    assert len(handle.answer.token_ids) == 5


class PanicException(BaseException):
    """By its name as the one of libraries written in Rust."""


@pytest.mark.parametrize("fails_at", ["each token", "the whole answer"])
def test_a_tokenizer_that_panics_at_an_answer_ends_it_and_the_service_goes_on(running, monkeypatch, fails_at):
    def panic(*_, **__):
        raise PanicException("index out of bounds")

    detokenizer = running.scheduler.detokenizer
    monkeypatch.setattr(detokenizer, "_tokenizer", SimpleNamespace(decode=panic))
    detokenizer._few.cache_clear()
    with pytest.raises(LlavaError, match="send the request again" if fails_at == "each token" else "fails at these"):
        list(running.submit(ask("Hi", max_new_tokens=9, ignore_eos=True), pieces=fails_at == "each token"))
    monkeypatch.undo()
    handle = running.submit(ask("Hi", max_new_tokens=5, ignore_eos=True))
    list(handle)
    assert len(handle.answer.token_ids) == 5


def test_stop_answers_what_was_taken_in(llama):
    engine = Engine(llama)
    engine.start()
    handles = [engine.submit(ask("Hi", max_new_tokens=40, ignore_eos=True)) for _ in range(5)]
    engine.stop(drain=True)
    for handle in handles:
        list(handle)
        assert len(handle.answer.token_ids) == 40
    engine.start()
    handle = engine.submit(ask("Hi", max_new_tokens=400, ignore_eos=True))
    while not engine.scheduler.running:
        time.sleep(0.001)
    engine.stop(drain=False)
    with pytest.raises(EngineStopped):
        list(handle)


@pytest.mark.parametrize(
    ("moment", "drain"),
    [("the thread has ended", True), ("the thread has ended", False), ("everything was given up", False),
     ("stop is over", True)],
)  # fmt: skip
def test_nothing_is_taken_in_from_stop_on(llama, monkeypatch, drain, moment):
    engine = Engine(llama)
    engine.start()
    join, abort = engine._thread.join, engine._abort
    moments = []

    def refused_after(original):
        def wrapped(*arguments):
            original(*arguments)
            moments.append(moment)
            with pytest.raises(EngineStopped, match="call start"):
                engine.submit(ask("Hi"), lambda news: None)

        return wrapped

    if moment == "the thread has ended":
        monkeypatch.setattr(engine._thread, "join", refused_after(join))
    elif moment == "everything was given up":
        monkeypatch.setattr(engine, "_abort", refused_after(abort))
    engine.stop(drain)
    assert moments == [moment] * (moment != "stop is over")
    for attempt in (engine.submit, lambda request: engine.generate([request])):
        with pytest.raises(EngineStopped, match="call start"):
            attempt(ask("Hi"))
    monkeypatch.undo()
    engine.start()
    assert "".join(engine.stream(ask("Hi", max_new_tokens=3, ignore_eos=True))) and engine.scheduler.is_idle
    engine.stop()


@pytest.mark.parametrize("drain", [True, False])
def test_a_request_that_meets_stop_is_answered_or_refused(llama, drain):
    engine = Engine(llama)
    for _ in range(20):
        engine.start()
        at_once, ended = threading.Barrier(2, timeout=60), threading.Event()

        def client(at_once=at_once, ended=ended):
            at_once.wait()
            try:
                engine.submit(ask("Hi", max_new_tokens=2), lambda news: isinstance(news, Answer) and ended.set())
            except EngineStopped:
                ended.set()

        thread = threading.Thread(target=client)
        thread.start()
        at_once.wait()
        engine.stop(drain)
        thread.join(60)
        assert not thread.is_alive() and ended.wait(10)


def test_a_listener_cannot_stop_the_engine_that_calls_it(llama):
    """It would wait for its own thread."""
    engine, errors, ended = Engine(llama), [], threading.Event()

    def listener(news):
        for drain in (True, False):
            try:
                engine.stop(drain)
            except LlavaError as error:
                errors.append(str(error))
        if isinstance(news, Answer):
            ended.set()

    engine.start()
    engine.submit(ask("Hi", max_new_tokens=2), listener, pieces=False)
    assert ended.wait(60)
    assert len(errors) == 2 and all("call stop() in another thread" in error for error in errors)
    engine.stop()


def test_start_waits_for_a_stop_that_answers_what_was_taken_in(llama):
    engine = Engine(llama)
    engine.start()
    handle = engine.submit(ask("Hi", max_new_tokens=200, ignore_eos=True))
    while not engine.scheduler.running:
        time.sleep(0.001)
    first = engine._thread
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while not engine._is_stopped:
        time.sleep(0.001)
    engine.start()
    assert not first.is_alive() and len(list(handle)) > 1
    stopping.join(60)
    assert not stopping.is_alive() and engine._thread is not None
    assert "".join(engine.stream(ask("Hi", max_new_tokens=3, ignore_eos=True)))
    engine.stop()


def test_beams_are_streamed_and_end_at_stop_strings(llama):
    beams = {"num_beams": 2, "max_new_tokens": 12, "ignore_eos": True}
    (whole,) = Engine(llama).generate([ask("Hi", **beams)])
    assert len(whole.text) > 4 and whole.finish_reason == "length"
    assert "".join(Engine(llama).stream(ask("Hi", **beams))) == whole.text
    (other,) = Engine(llama).generate([ask("Hi", stop=("not in it",), **beams)])
    assert (other.text, other.token_ids) == (whole.text, whole.token_ids)
    middle = whole.text[len(whole.text) // 2 :][:2]
    (ended,) = Engine(llama).generate([ask("Hi", stop=(middle,), **beams)])
    assert (ended.text, ended.finish_reason) == (whole.text.partition(middle)[0].strip(), "stop")


@pytest.mark.parametrize("ids, words", [([], "prompt is empty"), ([1, 5, 999_999], "id 999999"), ([1, -3], "id -3")])
def test_a_prompt_that_the_model_can_not_read_is_refused_before_it_meets_others(running, ids, words):
    """In a step it would have ended the others' answers, or have been answered from another row's last position."""
    beside = running.submit(ask("Hi", max_new_tokens=40, ignore_eos=True))
    with pytest.raises(LlavaError, match=f"'x'.*{words}"):
        running.submit(Request(ids, id="x"))
    list(beside)
    assert len(beside.answer.token_ids) == 40
