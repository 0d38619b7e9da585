"""The same language model, prompts and tokens through this engine, transformers and llama.cpp, on this machine.

    python benchmarks/peers.py --json peers.json

Each answers in a process of its own with two threads, in float32, greedily, exactly so many tokens for each prompt;
rounds alternate, so that none has a quieter machine than the others. `..._ratio` is ours over theirs in output tokens
per second, medians over the rounds, above 1 where we are faster. Of prompts: their tokens per second until all have
their first token.
"""

import importlib.util
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

from checkout import ROOT, add_json_flag, show

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError

THREADS = 2
PEERS = {
    "ours": "Ours",
    "transformers_generate": "Generate",
    "transformers_continuous": "Continuous",
    "llama_cpp": "LlamaCpp",
}
LEAST = {"transformers_generate": 8, "transformers_continuous": 8, "llama_cpp": 1}
"""Requests from which on a ratio is given."""
TEXT = """The chest radiograph of a woman of 64 years with cough and fever shows an opacity in the left lower lobe.
Is there a pleural effusion? Where is the abnormality? Which lobe is affected, and what would you do next? A CT of the
abdomen with contrast shows a mass of 4 cm in the right kidney, without fat, that takes up contrast. Describe what the
image shows, name the organ system, the modality and the plane, and say how sure you are of each finding. The magnetic
resonance image of the brain is T2-weighted and shows a lesion in the right parietal lobe with oedema around it. Are
there signs of haemorrhage? Is the midline shifted? How many lesions can be seen, and which of them is the largest? """


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default=str(ROOT / "models" / "smollm2-135m"), help="a plain language model")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="how many are given at once")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    add_json_flag(parser)
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    folder = args.model_path
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise LlavaError(f"{folder}: no model is there; scripts/fetch_small_models.sh fetches it")
    names = ["ours", *(name for name in args.peers if name != "ours")]
    if "llama_cpp" in names and not all(map(importlib.util.find_spec, ("llama_cpp_py_sync", "gguf"))):
        write_line("llama.cpp is left out: install the extra peers")
        names.remove("llama_cpp")
    prompts = make_prompts(folder, max(args.requests))
    pools: dict[str, ProcessPoolExecutor] = {}
    try:
        for name in names:
            pools[name] = process(name, folder)
        numbers = measured(pools, prompts, args)
    finally:
        for pool in pools.values():
            pool.submit(close)
            pool.shutdown()
    show(folder, numbers, args.json)


def process(name: str, folder: str) -> ProcessPoolExecutor:
    """One process that has loaded the model. The environment says how many threads, before any library is loaded."""
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), load, (PEERS[name], folder))
    pool.submit(timed, [[1, 2, 3]], 2).result()
    return pool


def load(kind: str, folder: str) -> None:
    """Begin a process."""
    import torch
    from peer_parts import answering
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    globals()["peer"] = getattr(answering, kind)(folder)


def timed(prompts, count: int) -> tuple[float, list[list[int]]]:
    """Seconds of an answer, and its tokens."""
    globals()["peer"].prepare(prompts, count)
    started = time.perf_counter()
    answers = globals()["peer"].answer(prompts, count)
    spent = time.perf_counter() - started
    if any(len(answer) != count for answer in answers):
        raise RuntimeError(f"an answer has other than {count} tokens: {[len(answer) for answer in answers]}")
    return spent, answers


def close() -> None:
    """End what would keep the process from ending."""
    getattr(globals()["peer"], "close", lambda: None)()


def make_prompts(folder: str, count: int) -> list[list[int]]:
    """Ids of `count` prompts of 20 to 200 tokens, each beginning otherwise."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT * 2, add_special_tokens=False)["input_ids"]
    lengths = [20 + (57 * number) % 181 for number in range(count)]
    starts = [(7 * number) % 100 for number in range(count)]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def measured(pools, prompts, args) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for requests in args.requests:
        given = prompts[:requests]
        tokens = sum(map(len, given))
        whole, first, answers = ({name: [] for name in pools} for _ in range(3))
        for number in range(args.rounds):
            order = list(pools)
            for name in order if number % 2 == 0 else reversed(order):
                first[name].append(pools[name].submit(timed, given, 1).result()[0])
                spent, answers[name] = pools[name].submit(timed, given, args.new_tokens).result()
                whole[name].append(spent)
        for name in pools:
            rate = requests * args.new_tokens / statistics.median(whole[name])
            numbers[f"{name}_{requests}_tokens_per_second"] = rate
            numbers[f"{name}_{requests}_prompt_tokens_per_second"] = tokens / statistics.median(first[name])
            numbers[f"{name}_{requests}_first_token_ms"] = statistics.median(first[name]) * 1e3
        for name in pools.keys() - {"ours"}:
            same = sum(one == other for one, other in zip(answers["ours"], answers[name], strict=True))
            numbers[f"equal_to_{name}_{requests}"] = same
            if requests >= LEAST[name]:
                ratios = [theirs / ours for ours, theirs in zip(whole["ours"], whole[name], strict=True)]
                numbers[f"over_{name}_{requests}_ratio"] = statistics.median(ratios)
    return numbers


if __name__ == "__main__":
    run(main)
