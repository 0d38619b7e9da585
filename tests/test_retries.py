"""How long a client waits before it asks again."""

import time
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from tenacity import RetryCallState

from llava.retries import AskedWait, retry_after

MOST = 5000.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "100000"}, MOST),
        ({"retry-after-ms": "1e9"}, MOST),
        ({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}, MOST),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_what_a_server_asks_for(headers, seconds):
    assert retry_after(headers, MOST) == seconds


def test_a_date_is_that_many_seconds_ahead():
    assert 3500 < retry_after({"retry-after": formatdate(time.time() + 3600, usegmt=True)}, MOST) <= 3600


def test_a_date_is_taken_by_the_servers_own_clock():
    hours_off = time.time() - 5 * 3600
    headers = {"retry-after": formatdate(hours_off + 90, usegmt=True), "date": formatdate(hours_off, usegmt=True)}
    assert retry_after(headers, MOST) == 90
    assert retry_after(headers | {"date": "no date"}, MOST) is None


def waits(wait, error, tries):
    state = RetryCallState(None, None, (), {})
    state.outcome = SimpleNamespace(exception=lambda: error)
    for number in tries:
        state.attempt_number = number
        yield wait(state)


def test_what_is_asked_goes_before_what_is_drawn():
    error = ValueError()
    drawn = [list(waits(AskedWait(1.0, most=20.0), error, range(1, 9))) for _ in range(50)]
    for number, column in enumerate(zip(*drawn)):
        most = min(20.0, 2.0**number)
        assert most / 2 < max(column) <= most and min(column) < most / 2
    error.seconds = 300.0
    assert list(waits(AskedWait(1.0), error, [1, 5])) == [300.0, 300.0]
