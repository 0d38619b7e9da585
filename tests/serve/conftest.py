"""Fixtures of the tests of serving."""

from tests.serve.browsing import browser, controller, open_page, web
from tests.tiny_serving import checkpoint, tiny_client, tiny_serving

__all__ = ["browser", "checkpoint", "controller", "open_page", "tiny_client", "tiny_serving", "web"]
