"""Applying a delta against the least that it can cost: reading base and delta once, writing the target once.

python benchmarks/apply_delta.py --json out.json

A synthetic LLaMA of about 2 GB (float16, rows of 4096, an embedding of 32003 rows) is made in --folder. Copying
and applying alternate, each in a fresh process, from a cold page cache, and end when all is flushed to the disk.
`wall_over_copy_ratio` is the median over --rounds of their ratio. `peak_mb` is the anonymous memory at the peak
above that of the process after its imports (file pages belong to the system and are given back on demand).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from checkout import add_json_flag, show

HIDDEN, MLP, ROWS, ADDED = 4096, 11008, 32000, 3
CHUNK = 16 << 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints (default: the temporary folder)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers, 0.4 GB each in addition to 0.5 GB")
    parser.add_argument("--rounds", type=int, default=3)
    add_json_flag(parser)
    parser.add_argument("--one", choices=["copy", "apply"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps({"copy": copy_once, "apply": apply_once}[args.one](args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_checkpoints(folder, args.layers)
        size = sum(path.stat().st_size for path in (folder / "delta").iterdir())
        rounds = []
        for number in range(args.rounds):
            order = ("copy", "apply") if number % 2 == 0 else ("apply", "copy")
            rounds.append({kind: run_one(kind, folder) for kind in order})
            print({kind: round(rounds[-1][kind]["seconds"], 2) for kind in order}, flush=True)
    results = {
        "checkpoint_mb": size / 1e6,
        "copy_seconds": statistics.median(entry["copy"]["seconds"] for entry in rounds),
        "apply_seconds": statistics.median(entry["apply"]["seconds"] for entry in rounds),
        "wall_over_copy_ratio": statistics.median(
            entry["apply"]["seconds"] / entry["copy"]["seconds"] for entry in rounds
        ),
        "peak_mb": max(entry["apply"]["peak_mb"] for entry in rounds),
    }
    show("copying and applying in turns", results, args.json)


def run_one(kind: str, folder: Path) -> dict[str, float]:
    for name in ("base", "delta"):
        for path in (folder / name).iterdir():
            forget(path)
    shutil.rmtree(folder / "target", ignore_errors=True)
    os.sync()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, __file__, "--one", kind, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def copy_once(folder: Path) -> dict[str, float]:
    """Read base and delta, write what was read of the delta; one buffer each, flushed at the end."""
    first, second = bytearray(CHUNK), bytearray(CHUNK)
    (folder / "target").mkdir()
    started = time.perf_counter()
    with (
        (folder / "base/model.safetensors").open("rb", buffering=0) as base,
        (folder / "delta/model.safetensors").open("rb", buffering=0) as delta,
        (folder / "target/model.safetensors").open("wb", buffering=0) as target,
    ):
        while count := delta.readinto(second):
            base.readinto(first)
            view = memoryview(second)[:count]
            while view:
                view = view[target.write(view) :]
        while base.readinto(first):
            pass
        os.fsync(target.fileno())
    return {"seconds": time.perf_counter() - started}


def apply_once(folder: Path) -> dict[str, float]:
    import transformers  # noqa: F401

    from llava.model.convert.delta import apply_delta

    before = anonymous_mb()
    peak, stop = [before], threading.Event()

    def watch():
        while not stop.wait(0.005):
            peak[0] = max(peak[0], anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    apply_delta(folder / "base", folder / "target", folder / "delta")
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    return {"seconds": seconds, "peak_mb": peak[0] - before}


def make_checkpoints(folder: Path, layers: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(16 << 20, generator=generator) * 0.02).half()

    def weights(rows: int, projector: bool, scale: float) -> dict:
        shapes = {"model.embed_tokens.weight": (rows, HIDDEN), "model.norm.weight": (HIDDEN,)}
        for layer in range(layers):
            name = f"model.layers.{layer}."
            shapes |= {f"{name}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
            shapes |= {f"{name}mlp.{part}_proj.weight": (MLP, HIDDEN) for part in ("gate", "up")}
            shapes |= {f"{name}mlp.down_proj.weight": (HIDDEN, MLP)}
            shapes |= {f"{name}{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
        shapes["lm_head.weight"] = (rows, HIDDEN)
        if projector:
            shapes |= {"model.mm_projector.weight": (HIDDEN, 1024), "model.mm_projector.bias": (HIDDEN,)}
        tensors = {}
        for index, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            start = index * 997
            flat = pool[start:].repeat(count // (len(pool) - start) + 1)[:count]
            tensors[name] = (flat * scale).reshape(shape)
        return tensors

    sizes = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": layers, "num_attention_heads": 32}
    for name, model_type, rows, scale in (("base", "llama", ROWS, 1), ("delta", "llava", ROWS + ADDED, 0.01)):
        (folder / name).mkdir()
        path = folder / name / "model.safetensors"
        save_file(weights(rows, name == "delta", scale), path, metadata={"format": "pt"})
        config = {"model_type": model_type, "vocab_size": rows, "torch_dtype": "float16"} | sizes
        (folder / name / "config.json").write_text(json.dumps(config))
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


if __name__ == "__main__":
    main()
