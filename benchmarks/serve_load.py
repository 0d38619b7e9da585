"""Serving under load, all of it real: controller, worker and API as processes, VQA-RAD questions over the wire.

    python benchmarks/serve_load.py --model-path runs/demo/vqa --json out.json

1. one closed-loop client, then 32 of them: output tokens/s each, and their ratio
2. in turns: 32 clients, 64 clients, and the engine alone on the same questions in batches of 32 and of 64: the share
   of the engine's best that the served path reaches, as the median of the turns
3. Poisson arrivals at half the capacity of 32 clients, streamed: what was lost, time to first token

The engine gets `--threads` threads in all parts; the other half of the cores is left to the servers and the clients.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
from checkout import DEMO_MODEL, IMAGES, QUESTIONS, ROOT, add_json_flag, show

from tests.serve.processes import Process
from tests.serve.streams import StreamError, events

NEW_TOKENS = 64
JSON = {"Content-Type": "application/json"}
UNLOADED_REQUESTS = 30


@dataclass
class Outcome:
    """One request: `first` and `whole` in seconds since it was sent, None if it was lost."""

    tokens: int = 0
    first: float | None = None
    whole: float | None = None
    error: str = ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, help="default: runs/demo/vqa, else a tiny random model")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--image-folder", type=Path, default=IMAGES)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="of each closed-loop phase, over all turns")
    parser.add_argument("--turns", type=int, default=5, help="of server and engine")
    parser.add_argument("--requests", type=int, default=2000, help="of the Poisson phase")
    parser.add_argument("--distinct", type=int, default=200, help="questions, with their images, to draw from")
    parser.add_argument("--device", default=None)
    parser.add_argument("--threads", type=int, default=max(1, os.cpu_count() // 2), help="of the engine, on the CPU")
    add_json_flag(parser)
    parser.add_argument("--engine-only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine_only:
        measure_engine(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.model_path = args.model_path or _default_model(Path(folder))
        bodies = read_questions(args)
        with EngineProcess(args, bodies, Path(folder)) as engine:
            results = measure_served(args, bodies, engine)
    show(f"{args.model_path}, {args.threads} threads for the engine", results, args.json)


def measure_served(args, bodies: list[dict], engine: "EngineProcess") -> dict[str, float]:
    environment = {"LLAVA_SERVE_SECRET": "benchmark", "LLAVA_API_KEYS": "", "OMP_NUM_THREADS": str(args.threads)}
    words = ["--model-path", str(args.model_path), "--model-name", "m"]
    words += ["--limit-model-concurrency", str(2 * args.clients), "--max-queue", "4096"]
    words += ["--device", args.device] if args.device else []
    with Process("llava.serve.controller", env=environment) as controller:
        controller.wait()
        at = ["--controller", controller.url]
        with (
            Process("llava.serve.model_worker", *at, *words, env=environment) as worker,
            Process("llava.serve.openai_api_server", *at, env=environment) as api,
        ):
            worker.wait(seconds=1800)
            api.wait(seconds=300)
            while httpx.get(api.url + "/ready", timeout=60).status_code != 200:
                time.sleep(0.2)
            return asyncio.run(_phases(args, api.url, [json.dumps(body).encode()[:-1] for body in bodies], engine))


async def _phases(args, url: str, bodies: list[bytes], engine: "EngineProcess") -> dict[str, float]:
    # The lightest client there is: it takes its time from the same cores.
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as http:
        await closed_loop(http, bodies, args.clients, count=len(bodies))  # every image seen once by all phases
        one, seconds = await closed_loop(http, bodies, 1, seconds=args.seconds)
        sequential = sum(outcome.tokens for outcome in one) / seconds
        closed, rates, alone = [], {args.clients: [], 2 * args.clients: []}, []
        for _ in range(args.turns):
            for clients, own in rates.items():
                outcomes, seconds = await closed_loop(http, bodies, clients, seconds=args.seconds / args.turns)
                own.append(sum(outcome.tokens for outcome in outcomes) / seconds)
                closed += outcomes
            alone.append(engine.measure())
        served = statistics.mean(rates[args.clients])
        unloaded = [await ask(http, body, stream=True) for body in bodies[:UNLOADED_REQUESTS]]
        loaded, seconds = await poisson(http, bodies, args.requests, served / NEW_TOKENS / 2)
        unloaded += [await ask(http, body, stream=True) for body in bodies[:UNLOADED_REQUESTS]]
    lost = [outcome for outcome in (*one, *closed, *loaded, *unloaded) if outcome.error]
    for outcome in lost[:5]:
        print(f"lost: {outcome.error}", file=sys.stderr)
    firsts = [[outcome.first for outcome in outcomes if outcome.first] for outcomes in (unloaded, loaded)]
    if not all(firsts):
        sys.exit("error: of one kind of load every answer was lost; nothing can be compared")
    at_rest, under_load = (_percentile(seconds, 95) for seconds in firsts)
    return {
        "clients": args.clients,
        "sequential_tokens_per_second": sequential,
        "served_tokens_per_second": served,
        "served_to_twice_the_clients_tokens_per_second": statistics.mean(rates[2 * args.clients]),
        "engine_tokens_per_second": statistics.mean(alone),
        "concurrent_over_sequential_ratio": served / sequential,
        "served_over_engine_ratio": statistics.median(
            max(served_now) / best for *served_now, best in zip(*rates.values(), alone, strict=True)
        ),
        "served_over_engine_with_so_many_clients_ratio": statistics.median(
            share / best for share, best in zip(rates[args.clients], alone, strict=True)
        ),
        "poisson_requests": len(loaded),
        "poisson_requests_per_second": len(loaded) / seconds,
        "lost": len(lost),
        "first_token_p95_unloaded_seconds": at_rest,
        "first_token_p95_seconds": under_load,
        "first_token_p50_seconds": statistics.median(firsts[1]),
        "first_token_p95_over_unloaded_ratio": under_load / at_rest,
    }


async def closed_loop(http, bodies, clients: int, seconds: float | None = None, count: int | None = None):
    """(outcomes, seconds): each client asks again once it has its answer, for so long or so many in all."""
    outcomes: list[Outcome] = []
    began, asked = time.perf_counter(), 0

    async def client():
        nonlocal asked
        while (asked < count) if seconds is None else (time.perf_counter() - began < seconds):
            asked += 1
            outcomes.append(await ask(http, bodies[asked % len(bodies)], stream=False))

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes, time.perf_counter() - began


async def poisson(http, bodies, count: int, rate: float):
    """(outcomes, seconds): requests at random times, `rate` per second on average, whoever is still waiting."""
    dice = random.Random(0)
    began, tasks, due = time.perf_counter(), [], 0.0
    for number in range(count):
        due += dice.expovariate(rate)
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - began)))
        tasks.append(asyncio.create_task(ask(http, bodies[number % len(bodies)], stream=True)))
    outcomes = await asyncio.gather(*tasks)
    return outcomes, time.perf_counter() - began


async def ask(http, body: bytes, stream: bool) -> Outcome:
    """`body` is JSON without its last brace: what is asked for is put after it, nothing is written anew."""
    outcome, began = Outcome(), time.perf_counter()
    more = b', "stream": true, "stream_options": {"include_usage": true}}' if stream else b"}"
    try:
        async with http.post("/v1/chat/completions", data=body + more, headers=JSON, raise_for_status=True) as reply:
            if stream:
                outcome.first, outcome.tokens = await _read_stream(reply, began)
            else:
                outcome.tokens = (await reply.json())["usage"]["completion_tokens"]
        outcome.whole = time.perf_counter() - began
        if outcome.tokens != NEW_TOKENS:
            raise ValueError(f"{outcome.tokens} tokens, not {NEW_TOKENS}")
    except (aiohttp.ClientError, TimeoutError, StreamError, ValueError, KeyError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def _read_stream(reply, began: float) -> tuple[float | None, int]:
    """(seconds to the first text, tokens) of a stream."""
    first, tokens = None, 0
    async for event in events(reply):
        if first is None and any(choice["delta"].get("content") for choice in event["choices"]):
            first = time.perf_counter() - began
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return first, tokens


class EngineProcess:
    """The engine in a process of its own, ready to be measured while the servers have nothing to do."""

    def __init__(self, args, bodies: list[dict], folder: Path):
        path = folder / "bodies.json"
        path.write_text(json.dumps(bodies))
        self.command = [sys.executable, __file__, "--engine-only", str(path), "--model-path", str(args.model_path)]
        self.command += ["--clients", str(args.clients), *(["--device", args.device] if args.device else [])]
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)}

    def __enter__(self) -> "EngineProcess":
        pipe = subprocess.PIPE
        # In this folder, as the servers: --model-path may be relative to it.
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True, env=self.environment)
        self._line()
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()

    def measure(self) -> float:
        """Output tokens per second, the better of both sizes of batch."""
        self.process.stdin.write("measure\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the engine's process ended; its last words are above")
        return line


def measure_engine(args) -> None:
    """Be the engine's process: a line when ready, and then a figure for each line that comes."""
    from llava.conversation import get_template
    from llava.generation import Engine, Request, SamplingParams
    from llava.model import load_pretrained_model
    from llava.serve.job import read_job, to_conversation

    loaded = load_pretrained_model(args.model_path, device=args.device)
    template = get_template(loaded.model.config.conversation_template)
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    requests = []
    for body in json.loads(args.engine_only.read_text()):
        messages = read_job(body).messages
        requests.append(Request(to_conversation(messages, template), messages[-1].images, sampling))
    engines = [Engine(loaded, max_batch_size=size) for size in (args.clients, 2 * args.clients)]
    for engine in engines:
        engine.generate(requests)  # images and prefixes known, as in the served phases
    print("ready", flush=True)
    for _ in sys.stdin:
        best = 0.0
        for engine in engines:
            began = time.perf_counter()
            tokens = sum(len(answer.token_ids) for answer in engine.generate(requests))
            best = max(best, tokens / (time.perf_counter() - began))
        print(best, flush=True)


def read_questions(args) -> list[dict]:
    """Chat requests: VQA-RAD's questions with their images; drawn images where VQA-RAD isn't there."""
    if args.questions.is_file():
        items = json.loads(args.questions.read_text())[: args.distinct]
        pairs = [(item["question"], (args.image_folder / item["image_name"]).read_bytes()) for item in items]
    else:
        from llava.serve.web.parts.examples import EXAMPLES, draw_example

        print(f"no questions at {args.questions}: a few drawn images instead", file=sys.stderr)
        pairs = [(f"{question} ({n})", draw_example(name)) for n in range(100) for name, _, question in EXAMPLES]
    bodies = []
    for question, image in pairs:
        url = "data:application/octet-stream;base64," + base64.b64encode(image).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": parts}]
        bodies.append({"model": "m", "messages": messages, "max_tokens": NEW_TOKENS, "ignore_eos": True})
    return bodies


def _default_model(folder: Path) -> Path:
    if DEMO_MODEL.is_dir():
        return DEMO_MODEL
    from tests.tiny import make_llava

    print("no runs/demo/vqa (make demo): a tiny random model instead", file=sys.stderr)
    return make_llava(folder)


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


if __name__ == "__main__":
    main()
