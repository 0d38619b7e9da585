"""Fixtures of the tests with other clients."""

from tests.tiny_serving import checkpoint, tiny_client, tiny_serving

__all__ = ["checkpoint", "tiny_client", "tiny_serving"]
