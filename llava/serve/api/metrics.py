"""What the API tells Prometheus: requests, errors, time to first token, tokens; and the workers' own gauges."""

import hashlib
import secrets
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """One registry per server, none global."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.key = secrets.token_bytes(16)
        self.requests = Counter("llava_requests", "Requests answered", ["model", "status"], registry=registry)
        self.errors = Counter("llava_errors", "Errors by type", ["type"], registry=registry)
        self.in_flight = Gauge("llava_requests_in_flight", "Requests being answered", registry=registry)
        self.first_token = Histogram(
            "llava_time_to_first_token_seconds", "To the first piece of text", buckets=_SECONDS, registry=registry
        )
        self.duration = Histogram(
            "llava_request_seconds", "To the end of the answer", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("llava_prompt_tokens", "Positions of prompts", registry=registry)
        self.completion_tokens = Counter("llava_completion_tokens", "Tokens answered", registry=registry)
        self.cached_tokens = Counter("llava_cached_tokens", "Prompt positions taken from the cache", registry=registry)
        self.speed = Histogram(
            "llava_tokens_per_second",
            "Tokens of one answer per second",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
            registry=registry,
        )

    def finished(self, usage: dict[str, Any], seconds: float) -> None:
        self.duration.observe(seconds)
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.completion_tokens.inc(usage["completion_tokens"])
        self.cached_tokens.inc(usage["cached_tokens"])
        if seconds > 0:
            self.speed.observe(usage["completion_tokens"] / seconds)

    def text(self, workers: list[dict[str, Any]]) -> bytes:
        """The exposition, with the workers' stats as of now (queue_length, running, ...)."""
        return generate_latest(self.registry) + generate_latest(_of_workers(workers, self.key))


def _of_workers(workers: list[dict[str, Any]], key: bytes) -> CollectorRegistry:
    registry = CollectorRegistry()
    ready = Gauge("llava_workers", "Workers that answer", registry=registry)
    ready.set(len(workers))
    gauges: dict[str, Gauge] = {}
    for worker in workers:
        # Who holds an API key learns no address.
        label = hashlib.blake2b(worker["address"].encode(), key=key, digest_size=6).hexdigest()
        labels = (label, ",".join(worker["model_names"]))
        for name, value in (worker["stats"] or {"queue_length": worker["queue_length"]}).items():
            if name not in gauges:
                words = name.replace("_", " ")
                gauges[name] = Gauge(f"llava_worker_{name}", words, ["worker", "model"], registry=registry)
            gauges[name].labels(*labels).set(value)
    return registry
