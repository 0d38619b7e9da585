"""Fixtures of the tests of the web page."""

import pytest

from tests.serve.browsing import worker


@pytest.fixture(scope="module")
def models(controller):
    """Two scripted workers; the first is a model of the demo."""
    with (
        worker(controller, "demo-model") as first,
        worker(controller, "other-model", trained_on="PMC figures") as other,
    ):
        yield first.wait(), other.wait()
