"""The OpenAI API: bodies of requests and replies, keys with their limits, metrics."""
