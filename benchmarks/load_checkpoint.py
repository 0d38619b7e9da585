"""How long a checkpoint takes to load, compared with reading its bytes, and how much memory at the peak.

python benchmarks/load_checkpoint.py --json out.json

A synthetic LLaVA-Med v1.0 of real row shapes (32003 × 4096 embeddings, 7B layers) is written once; then each of
several fresh processes drops it from the page cache and reads all its bytes, or loads it. Memory is anonymous
memory above the process after its imports.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from checkout import add_json_flag, show

SHARD_BYTES = 1 << 30
LAYER_BYTES = 2 * (4 * 4096**2 + 3 * 4096 * 11008)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="float16", help="what to load in; stored is float16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint (default: a temporary folder)")
    add_json_flag(parser)
    parser.add_argument("--child", choices=["read", "load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_read(args) if args.child == "read" else _load(args)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        args.folder = _make(Path(folder), args.gigabytes)
        runs = {name: [] for name in ("read", "load")}
        for _ in range(args.repeat):
            # In turn, so that a disk that gets slower or faster does so for both.
            for name, results in runs.items():
                results.append(_run(name, args))
    median = {name: statistics.median(run["seconds"] for run in results) for name, results in runs.items()}
    weights = runs["load"][0]["weights_mb"]
    peak = max(run["peak_mb"] for run in runs["load"])
    results = {
        "checkpoint_mb": runs["read"][0]["bytes"] / 2**20,
        "read_seconds": median["read"],
        "load_seconds": median["load"],
        "load_over_read_ratio": median["load"] / median["read"],
        "weights_mb": weights,
        "peak_mb": peak,
        "peak_over_weights_ratio": peak / weights,
    }
    show("reading and loading in turns", results, args.json)


def _make(folder: Path, gigabytes: float) -> Path:
    import torch
    from safetensors.torch import save_file

    from llava.model import LlavaLlamaConfig, LlavaLlamaForCausalLM
    from llava.model.weights.assemble import build_empty
    from tests.tiny import make_clip, make_tokenizer

    layers = max(1, round((gigabytes * 2**30 - 2 * 2 * 32003 * 4096) / LAYER_BYTES))
    vision = json.loads(
        (make_clip(folder / "clip", hidden_size=1024, num_attention_heads=16) / "config.json").read_text()
    )
    config = LlavaLlamaConfig(
        vocab_size=32003,
        num_hidden_layers=layers,
        mm_vision_tower=str(folder / "clip"),
        mm_vision_config=vision,
        conversation_template="simple",
        dtype="float16",
    )
    checkpoint = folder / "checkpoint"
    model = build_empty(LlavaLlamaForCausalLM, config)
    make_tokenizer(checkpoint)
    config.architectures = ["LlavaLlamaForCausalLM"]
    config.save_pretrained(checkpoint)
    shards, weight_map = [{}], {}
    for name, tensor in model.state_dict().items():
        if sum(value.nbytes for value in shards[-1].values()) + 2 * tensor.numel() > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = torch.randn(tensor.shape).half() if tensor.ndim == 1 else _noise(tensor.shape)
        weight_map[name] = f"model-{len(shards):05d}.safetensors"
    for number, shard in enumerate(shards, 1):
        save_file(shard, checkpoint / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    os.sync()
    return checkpoint


def _noise(shape):
    import torch

    block = torch.randn(min(shape[0], 64), *shape[1:]).half()
    return block.repeat(-(-shape[0] // len(block)), *[1] * (len(shape) - 1))[: shape[0]].contiguous()


def _run(name: str, args) -> dict:
    if not args.warm:
        for path in _files(args.folder):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--child", name, "--folder", args.folder, "--dtype", args.dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _read(args) -> dict:
    started = time.perf_counter()
    total = 0
    buffer = memoryview(bytearray(1 << 24))
    for path in _files(args.folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return {"seconds": time.perf_counter() - started, "bytes": total}


def _load(args) -> dict:
    from llava.model import build_model_from_llm, load_pretrained_model  # noqa: F401  (all imports)

    watch = _AnonymousMemory()
    started = time.perf_counter()
    model = load_pretrained_model(args.folder, device="cpu", dtype=args.dtype).model
    seconds = time.perf_counter() - started
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {"seconds": seconds, "weights_mb": weights / 2**20, "peak_mb": watch.stop() / 2**20}


class _AnonymousMemory:
    """The highest anonymous memory of this process since the start, above what it was then."""

    def __init__(self):
        self.start = self.peak = self._now()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())
        return self.peak - self.start

    def _watch(self):
        while not self._stopped.wait(0.005):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
