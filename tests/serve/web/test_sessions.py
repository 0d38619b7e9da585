"""What waits for browsers that don't read it: counted, capped, and dropped where nobody reads."""

import asyncio
from types import SimpleNamespace

import pytest

from llava.serve.web.sessions import MOST_CALLS, MOST_MESSAGES, Sessions, UnreadMessages


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


@pytest.mark.parametrize(
    ("messages", "calls", "busy"), [(MOST_MESSAGES, 0, True), (0, MOST_CALLS, True), (9, 9, False)]
)
def test_a_session_is_busy(messages, calls, busy):
    events = {number: SimpleNamespace(session_hash="a", alive=True) for number in range(calls)}
    events["other"] = other = SimpleNamespace(session_hash="b", alive=True)
    queue = SimpleNamespace(event_ids_to_events=events, pending_event_ids_session={"a": {1}})
    sessions = Sessions(queue, 10, lambda name: False)
    add(queue.pending_messages_per_session, "a", *[1] * messages)
    assert sessions.is_busy("a") == busy and not sessions.is_busy("b")
    sessions._end("a")
    assert other.alive and not any(event.alive for event in events.values() if event is not other)
    assert queue.pending_event_ids_session == {}


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
