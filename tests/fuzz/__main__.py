"""Seeded mutations of sound files: `python -m tests.fuzz [--count N] [--seed N] [--kind KIND] [--json PATH]`.

Prints figures of each kind as JSON; exit code 1 if anything was found (tests/fuzz/harness.py says what that is).
"""

import argparse
import json
import sys
from pathlib import Path

from tests.fuzz import files, images
from tests.fuzz.harness import child, run

KINDS = (*images.KINDS, *files.TARGETS)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        kind, start, count, seed, progress = sys.argv[2:]
        child(kind, int(start), int(count), int(seed), Path(progress))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="of files of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    results = []
    for kind in args.kind or KINDS:
        results.append(run(kind, args.count, args.seed))
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "results": results}, indent=1) + "\n")
    return 1 if any(result["findings"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
