"""Speed and memory of `llava.data.validate` on a million records, without images and tokenizer, on one core.

python benchmarks/validate.py [--json figures.json]
"""

import resource
import tempfile
import time
from collections import deque
from pathlib import Path

from checkout import add_json_flag, show

from llava.commandline import ArgumentParser, run
from llava.data.validate import Report, validate
from llava.records import write_records

QUESTIONS = ("What is shown in this image?\n<image>", "<image>\nIs there a fracture of the left femur?")
ANSWERS = ("Yes", "The chest X-ray shows a large nodule in the left upper lobe with a sharp edge.", "No.", "liver")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    add_json_flag(parser)
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        for suffix in ("json", "jsonl"):
            path = Path(name) / f"records.{suffix}"
            write_records(path, make_records(args.records))
            report = Report()
            wall, cpu = time.perf_counter(), time.process_time()
            deque(validate(path, report), maxlen=0)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if report.records != args.records or report.faulty != args.records // 1000:
                raise SystemExit(f"wrong counts: {report}")
            figures[f"{suffix}_records_per_core_second"] = args.records / cpu
            figures[f"{suffix}_records_per_second"] = args.records / wall
            figures[f"{suffix}_file_mb"] = path.stat().st_size / 1e6
            path.unlink()
    figures["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    show(f"{args.records:,} records", figures, args.json)
    return 0


def make_records(count: int):
    """Two turns and an image each; the last of every thousand has an empty answer."""
    for number in range(count):
        answer = "" if number % 1000 == 999 else ANSWERS[number % 4]
        yield {
            "id": f"{number:08d}_F{number % 7}",
            "image": f"{number:08d}_F{number % 7}.jpg",
            "conversations": [
                {"from": "human", "value": QUESTIONS[number % 2]},
                {"from": "gpt", "value": answer},
            ],
        }


if __name__ == "__main__":
    run(main)
