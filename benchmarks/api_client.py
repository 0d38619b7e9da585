"""How close the API client comes to the ideal: items × latency ÷ concurrency, against a server on loopback.

python benchmarks/api_client.py --json out.json
"""

import argparse
import tempfile
import time
from pathlib import Path

import openai  # noqa: F401  (half a second of imports is not what is measured)
from checkout import add_json_flag, show

from llava.openai_api import ApiSettings, ChatJob, run_jobs
from llava.resumable import ResumableJsonl
from tests.openai_server import OpenAIServer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that the server takes")
    parser.add_argument("--concurrency", type=int, default=64)
    add_json_flag(parser)
    args = parser.parse_args()
    jobs = [ChatJob(n, [{"role": "user", "content": f"item {n}"}]) for n in range(args.items)]
    with OpenAIServer("--delay", str(args.latency)) as server, tempfile.TemporaryDirectory() as folder:
        settings = ApiSettings(model="m", api_key="k", base_url=server.url, concurrency=args.concurrency)
        started = time.perf_counter()
        with ResumableJsonl(Path(folder) / "out.jsonl") as output:
            summary = run_jobs(
                jobs, settings, output, lambda job, result: {"question_id": job.key, "text": result.text}
            )
        seconds = time.perf_counter() - started
        peak = server.stats()["peak"]
    ideal = args.items * args.latency / args.concurrency
    results = {
        "items": summary.done,
        "seconds": seconds,
        "ideal_seconds": ideal,
        "share_of_ideal": ideal / seconds,
        "peak_in_flight": peak,
    }
    show(f"{args.items} items, {args.concurrency} at once", results, args.json)


if __name__ == "__main__":
    main()
