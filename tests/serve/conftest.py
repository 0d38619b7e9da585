"""Fixtures of the tests of serving."""

from tests.tiny_serving import checkpoint, tiny_client, tiny_serving

__all__ = ["checkpoint", "tiny_client", "tiny_serving"]
