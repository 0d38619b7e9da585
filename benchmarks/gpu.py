"""What a GPU does with this code: right results first, then speed. One call, offline, a few minutes.

Parts, most important first, each a process of its own with a time limit: attention against float64; tiny trainings
against the CPU's losses; 7B-shaped layers packed to 4096 tokens (MFU, memory, waits for the GPU, top kernels); the
GPU's ceilings; decoding. Results are written after each part.

    python benchmarks/gpu.py --json gpu.json

`--miniature` runs every part in small on the CPU: it shows that the parts work, its numbers mean nothing.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkout import ROOT, add_json_flag

LIMITS = {
    "attention": 90,
    "training": 130,
    "layers": 100,
    "layers_checkpointed": 100,
    "layers_compiled": 150,
    "whole_7b": 200,
    "ceilings": 45,
    "decode": 180,
}
"""Seconds at most, by part, in the order in which they are run."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_flag(parser)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="run these alone")
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together")
    parser.add_argument("--miniature", action="store_true", help="in small, on the CPU")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)  # what the processes below are told
    args = parser.parse_args(argv)
    if args.part:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        args.json.write_text(json.dumps(run_part(args.part, args.miniature)))
        return 0
    results: dict[str, dict] = {}
    started = time.monotonic()
    for part in args.parts:
        left = args.seconds - (time.monotonic() - started)
        results[part] = (
            in_process(part, min(LIMITS[part], left), args.miniature) if left > 5 else {"skipped": "no time"}
        )
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        show_part(part, results[part])
    return 1 if any(result.get("error") or result.get("wrong") for result in results.values()) else 0


def in_process(part: str, limit: float, miniature: bool) -> dict:
    """The part's results, with `seconds`; `error` where it failed or ran past `limit`."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--part", part, "--json", str(target)]
        command += ["--miniature"] if miniature else []
        started = time.monotonic()
        with (Path(folder) / "log").open("w+b") as log:
            # A session of its own: what it started ends with it.
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
            try:
                code = process.wait(limit)
                problem = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                problem = f"stopped after {limit:.0f} s"
            log.seek(0)
            problem = f"{problem}: {log.read().decode(errors='replace')[-3000:]}" if problem else ""
        result = json.loads(target.read_text()) if target.is_file() else {}
    if problem:
        result["error"] = problem
    return result | {"seconds": round(time.monotonic() - started, 1)}


def run_part(part: str, miniature: bool) -> dict:
    """Run one part here."""
    from gpu_parts import speed, training

    work = {
        "attention": speed.attention,
        "ceilings": speed.ceilings,
        "decode": speed.decode,
        "training": training.small_trainings,
        "layers": training.layers,
        "layers_checkpointed": lambda small: training.layers(small, "--gradient_checkpointing", "True"),
        "whole_7b": lambda small: training.layers(small, *training.WHOLE),
        "layers_compiled": lambda small: training.layers(small, "--torch_compile", "True"),
    }
    return work[part](miniature)


def show_part(part: str, result: dict) -> None:
    print(f"== {part} ({result.get('seconds', 0)} s)", flush=True)
    for name, value in result.items():
        if name == "seconds":
            continue
        if isinstance(value, dict):
            for inner, number in value.items():
                for line in number if isinstance(number, list) else [number]:
                    print(f"  {name:22} {inner:34} {_number(line)}", flush=True)
        elif isinstance(value, list):
            for line in value:
                print(f"  {name:22} {line}", flush=True)
        else:
            print(f"  {name:22} {_number(value)}", flush=True)


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
