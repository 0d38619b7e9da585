"""What waits for browsers that don't read it: counted, capped, and dropped where nobody reads."""

import asyncio
from types import SimpleNamespace

import pytest

from llava.serve.web.sessions import CALLS_IN_ALL, MOST_CALLS, MOST_MESSAGES, SMALL_CALL, Sessions, UnreadMessages


def message(size: int) -> SimpleNamespace:
    return SimpleNamespace(output={"data": ["x" * size, [{"content": 1}], None]})


def table(dropped: list[str], most_sessions=10, per_session=10_000, in_all=25_000) -> UnreadMessages:
    return UnreadMessages(most_sessions, dropped.append, per_session, in_all)


def add(unread: UnreadMessages, session: str, *sizes: int) -> None:
    if session not in unread:
        unread[session] = asyncio.Queue()
    messages = unread[session]
    for size in sizes:
        messages.put_nowait(message(size))


def test_what_was_read_counts_no_more():
    dropped: list[str] = []
    unread = table(dropped)
    for _ in range(20):
        add(unread, "a", 4000, 4000)
        assert unread.count("a") == 2
        assert [len(unread["a"].get_nowait().output["data"][0]) for _ in range(2)] == [4000, 4000]
    assert dropped == [] and unread["a"].size == 0 and unread.count("a") == unread.count("b") == 0


def test_a_session_with_too_much_unread_is_dropped():
    dropped: list[str] = []
    unread = table(dropped)
    add(unread, "one large", 12_000)
    add(unread, "many", *[3000] * 3)
    assert dropped == []
    add(unread, "many", 3000)
    assert dropped == ["many"] and "many" not in unread and "one large" in unread
    add(unread, "many", 3000)
    assert dropped == ["many"] and unread.count("many") == 1


def test_all_together_have_a_total_and_who_reads_goes_last():
    dropped: list[str] = []
    unread = table(dropped)
    with unread.being_read("read"):
        add(unread, "read", 9800)
        for name in "abc":
            add(unread, name, 7000)
        assert dropped == ["a"]
        for number in range(50):
            add(unread, f"more{number}", 100)
        assert "read" in unread and len(unread) == 10
    add(unread, "late", 8000)
    add(unread, "later", 8000)
    assert "read" in dropped


def event(session: str, size: int = 0) -> SimpleNamespace:
    data = SimpleNamespace(data=[{"text": "x" * size, "files": []}])
    return SimpleNamespace(session_hash=session, alive=True, concurrency_id="ask", data=data)


def gradio_queue(*events: SimpleNamespace, waiting=()) -> SimpleNamespace:
    return SimpleNamespace(
        event_ids_to_events=dict(enumerate(events)),
        event_queue_per_concurrency_id={"ask": SimpleNamespace(queue=list(waiting))},
        pending_event_ids_session={"a": {1}},
    )


@pytest.mark.parametrize(
    ("messages", "calls", "busy"), [(MOST_MESSAGES, 0, True), (0, MOST_CALLS, True), (9, 9, False)]
)
def test_a_session_is_busy(messages, calls, busy):
    queue = gradio_queue(event("b"), *[event("a") for _ in range(calls)])
    sessions = Sessions(queue, 10, lambda name: False)
    add(queue.pending_messages_per_session, "a", *[1] * messages)
    assert sessions.is_busy("a") == busy and not sessions.is_busy("b")


def test_calls_of_a_dropped_session_end():
    other, runs, waits = event("b"), event("a"), event("a")
    queue = gradio_queue(other, runs, waits, waiting=[other, waits])
    sessions = Sessions(queue, 1, lambda name: False)
    add(sessions.unread, "a", 1)
    add(sessions.unread, "b", 1)
    assert list(sessions.unread) == ["b"] and queue.pending_event_ids_session == {}
    assert (other.alive, runs.alive, waits.alive) == (True, False, False)
    assert list(queue.event_ids_to_events.values()) == [other, runs]
    assert queue.event_queue_per_concurrency_id["ask"].queue == [other]


def test_calls_that_wait_have_a_total_but_for_small_ones():
    size = CALLS_IN_ALL // 8
    sessions = Sessions(gradio_queue(*[event(str(number), size) for number in range(7)]), 10, lambda name: False)
    assert sessions.has_space(size // 2) and not sessions.has_space(2 * size) and sessions.has_space(SMALL_CALL)
    sessions.queue.event_ids_to_events[8] = event("8", size - 10_000)
    assert not sessions.has_space(size // 2) and sessions.has_space(SMALL_CALL)


def test_a_session_is_whose_it_was_first_for_as_long_as_it_is_kept():
    kept = {"a"}
    sessions = Sessions(SimpleNamespace(event_ids_to_events={}), 10, kept.__contains__)
    assert sessions.belongs("a", "first") and not sessions.belongs("a", "other") and not sessions.belongs("a", None)
    assert sessions.belongs("b", None) and not sessions.belongs("b", "first")
    add(sessions.unread, "c", 1)
    assert sessions.belongs("c", "first")
    for number in range(1000):
        assert sessions.belongs(f"more{number}", "other")
    assert len(sessions._owners) == 40
    assert not sessions.belongs("a", "other") and not sessions.belongs("c", "other")
    kept.clear()
    for number in range(1000):
        sessions.belongs(f"more{number}", "other")
    assert sessions.belongs("a", "other") and not sessions.belongs("c", "other")
