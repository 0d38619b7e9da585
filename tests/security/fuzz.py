"""Requests made from the servers' descriptions, valid, invalid and damaged, against controller, worker and API.

    python -m tests.security.fuzz --cases 10000

What counts as found: an answer that isn't what the description says, an error without a type, "internal_error", a
connection that breaks off, a traceback in a log. Prints figures as JSON; exit code 1 if anything was found.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.failures import Failure, FailureGroup

from llava.serve.description import OPERATIONS, document
from llava.serve.protocol import ERRORS, ErrorType, split_chunks
from tests.serve.processes import Process, wait_until

SECRET, KEY = "s3cret", "key-for-tests"
ENV = {"LLAVA_SERVE_SECRET": SECRET, "LLAVA_API_KEYS": KEY}
HEADERS = {"x-llava-secret": SECRET, "authorization": f"Bearer {KEY}"}
MODES = ("valid", "invalid", "damaged")


@dataclass
class Findings:
    statuses: Counter = field(default_factory=Counter)
    found: dict[str, str] = field(default_factory=dict)  # what: the first request that showed it

    @property
    def cases(self) -> int:
        return sum(self.statuses.values())

    def figures(self) -> dict:
        return {"cases": self.cases, "statuses": dict(sorted(self.statuses.items())), "found": self.found}


@contextlib.contextmanager
def servers(folder: Path):
    """{name: process} of all three, logs in `folder`."""
    with Process("llava.serve.controller", env=ENV, log=folder / "controller") as controller:
        controller.wait()
        words = ("--controller", controller.url)
        worker_words = (*words, "--pause", "0")
        with (
            Process("tests.serve.scripted_worker", *worker_words, env=ENV, log=folder / "worker") as worker,
            Process("llava.serve.openai_api_server", *words, env=ENV, log=folder / "api") as api,
        ):
            api.wait()
            wait_until(lambda: httpx.get(api.url + "/ready", headers=HEADERS).status_code == 200, 30)
            yield {"controller": controller, "worker": worker, "api": api}


def fuzz(name, url: str, cases: int, findings: Findings, number: int = 0, headers=None, paths=None) -> None:
    """About `cases` requests to the server `name` at `url`, evenly over its operations (those at `paths`, if given);
    the same for the same seed."""
    schema = schemathesis.openapi.from_dict(document(name))
    operations = [result.ok() for result in schema.get_all_operations()]
    operations = [operation for operation in operations if paths is None or operation.path in paths]
    kinds = [(operation, mode) for operation in operations for mode in _modes(operation)]
    with httpx.Client(base_url=url, headers=headers or HEADERS, timeout=60) as client:
        for operation, mode in kinds:
            _run(client, operation, mode, max(1, cases // len(kinds)), findings, number)


def _modes(operation) -> tuple[str, ...]:
    """Without a body or parameters every request is the same."""
    if operation.body:
        return MODES
    return MODES[:2] if operation.path_parameters else MODES[:1]


def _run(client, operation, mode: str, count: int, findings: Findings, number: int) -> None:
    generation = GenerationMode.NEGATIVE if mode == "invalid" else GenerationMode.POSITIVE
    quiet = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @quiet
    @seed(number)
    @given(operation.as_strategy(generation_mode=generation), st.data())
    def ask(case, data):
        request = case.as_transport_kwargs(base_url=str(client.base_url))
        content = request.get("data") or b""
        if "json" in request:
            content = json.dumps(request["json"]).encode()
        content = content if isinstance(content, bytes) else str(content).encode("utf-8", "replace")
        if mode == "damaged":
            content = _damage(content, data)
        headers = {"content-type": "application/json"} | {
            key: value for key, value in (request.get("headers") or {}).items() if key.lower() == "content-type"
        }
        label = f"{operation.method.upper()} {operation.path} ({mode})"
        try:
            response = client.request(request["method"], request["url"], content=content, headers=headers)
        except httpx.InvalidURL:
            return
        except httpx.TransportError as error:
            findings.statuses[0] += 1
            findings.found.setdefault(f"{label}: {type(error).__name__}", repr(content[:300]))
            return
        findings.statuses[response.status_code] += 1
        if fault := _fault(operation, response):
            findings.found.setdefault(f"{label}: {fault}", f"{request['url']} {content[:300]!r}")

    ask()


def _damage(content: bytes, data) -> bytes:
    """`content` with some bytes cut, doubled, replaced or put in."""
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 12)))
        piece = data.draw(
            st.one_of(st.just(b""), st.just(content[start:end] * 2), st.binary(max_size=4), st.sampled_from(_PIECES))
        )
        content = content[:start] + piece + content[end:]
    return content


_PIECES = [b"null", b"NaN", b"1e999", b"-1", b'"\\ud800"', b"[" * 2000, b'{"a":', b"\x00", b"\xff", b"true", b"9" * 400]


def _fault(operation, response) -> str | None:
    """What is wrong with an answer, or None."""
    if response.status_code != 200:
        return _error_fault(response.content, response.status_code)
    kind = response.headers.get("content-type", "").partition(";")[0]
    if kind == "application/octet-stream":
        return _stream_fault(*split_chunks(response.content))
    if kind == "text/event-stream":
        events = [event.removeprefix(b"data: ") for event in response.content.split(b"\n\n") if event]
        return _stream_fault([json.loads(event) for event in events if event != b"[DONE]"], b"")
    try:
        operation.validate_response(response)
    except (Failure, FailureGroup) as error:
        return f"not as described: {str(error)[:200]}"
    return None


def _stream_fault(chunks: list[dict], rest: bytes) -> str | None:
    if rest or not chunks:
        return "a stream without an end"
    last = chunks[-1]
    kind = last.get("error_type") or last.get("error", {}).get("type")
    return "internal_error in a stream" if kind == ErrorType.INTERNAL else None


def _error_fault(content: bytes, status: int) -> str | None:
    try:
        kind = ErrorType(json.loads(content)["error"]["type"])
    except (ValueError, KeyError, TypeError):
        return f"{status} without a type: {content[:80]!r}"
    if kind is ErrorType.INTERNAL:
        return "internal_error"
    return None if ERRORS[kind].status == status else f"{kind} with status {status}"


def look_at_logs(logs: list[Path], findings: Findings) -> None:
    for log in logs:
        text = log.read_text(errors="replace")
        if "Traceback" in text:
            findings.found[f"traceback in the log of {log.name}"] = text[text.index("Traceback") :][-600:]


def fuzz_all(cases: int, number: int = 0) -> Findings:
    """`cases` requests, shared among the three servers by their number of operations."""
    findings = Findings()
    total = sum(len(operations) for operations in OPERATIONS.values())
    with tempfile.TemporaryDirectory() as folder:
        with servers(Path(folder)) as running:
            for name, process in running.items():
                fuzz(name, process.url, cases * len(OPERATIONS[name]) // total, findings, number)
                if process.process.poll() is not None:
                    findings.found[f"{name} has ended"] = str(process.process.returncode)
        look_at_logs(sorted(Path(folder).iterdir()), findings)
    return findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given_args = parser.parse_args()
    result = fuzz_all(given_args.cases, given_args.seed)
    print(json.dumps(result.figures(), indent=1))
    sys.exit(1 if result.found else 0)
