"""float32 products of a language model's shapes on the CPU: torch's own (MKL in most builds) and oneDNN's.

    python benchmarks/cpu_products.py --json products.json

For few rows a product is bound by reading its weights: GB/s of them, beside the speed of memory (a sum).
`..._ratio` is oneDNN's speed over torch's own, medians of alternating rounds.
"""

import statistics
import time

import torch
from checkout import add_json_flag, show

from llava.commandline import ArgumentParser, run
from llava.errors import LlavaError
from llava.model.products import OneDnnLinear, has_onednn

SHAPES = {"qkv": (576, 960), "gate_up": (576, 3072), "down": (1536, 576), "head": (576, 49152)}
"""Of SmolLM2-135M: inputs and outputs."""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 256], help="rows of a product")
    parser.add_argument("--megabytes", type=int, default=200, help="of weights read in a round, more than caches hold")
    parser.add_argument("--rounds", type=int, default=5)
    add_json_flag(parser)
    return parser


@torch.inference_mode()
def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    if not has_onednn():
        raise LlavaError("this build of torch has no oneDNN: there is nothing to compare")
    memory = torch.ones(args.megabytes * 250_000)
    numbers = {"memory_gb_per_second": memory.nbytes / statistics.median(seconds(memory.sum) for _ in range(5)) / 1e9}
    for name, (inputs, outputs) in SHAPES.items():
        count = max(args.megabytes * 250_000 // (inputs * outputs), 1)
        own = [torch.nn.Linear(inputs, outputs, bias=False) for _ in range(count)]
        onednn = [OneDnnLinear(inputs, outputs, bias=False) for _ in range(count)]
        for rows in args.rows:
            states = torch.randn(rows, inputs)
            spent = {"torch": [], "onednn": []}
            for _ in range(args.rounds + 1):
                for kind, modules in (("torch", own), ("onednn", onednn)):
                    spent[kind].append(seconds(lambda modules=modules, states=states: [one(states) for one in modules]))
            size = count * inputs * outputs * 4
            for kind, taken in spent.items():
                numbers[f"{name}_{rows}_{kind}_gb_per_second"] = size / statistics.median(taken[1:]) / 1e9
            pairs = zip(spent["torch"][1:], spent["onednn"][1:], strict=True)
            numbers[f"{name}_{rows}_ratio"] = statistics.median(one / other for one, other in pairs)
    show(f"{torch.get_num_threads()} threads", numbers, args.json)


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)
