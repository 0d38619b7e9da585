"""Parts of benchmarks/gpu.py: attention against float64, the GPU's ceilings, decoding with the engine."""

import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from llava.generation.attention.kernels import GATHERED

LENGTHS = (1, 585, 2, 1200, 129, 640, 63, 900, 575, 1)
"""Of the samples of one pack, 4096 tokens in all."""


def device_of(miniature: bool) -> torch.device:
    return torch.device("cpu" if miniature else "cuda")


def attention(miniature: bool) -> dict:
    """Packed attention and its gradients against float64, by dtype, heads and window: ‖out − ref‖ / ‖ref‖."""
    device = device_of(miniature)
    lengths = (1, 20, 3, 40) if miniature else LENGTHS
    dtypes = {"float32": torch.float32} if miniature else {"bf16": torch.bfloat16, "fp16": torch.float16}
    errors, wrong = {}, []
    for name, dtype in dtypes.items():
        for keys, window in ((32, None), (8, None), (8, 33)):
            found = attention_error(lengths, 32, keys, 32 if miniature else 128, dtype, window, device)
            errors[f"{name} {keys} key heads" + (f", window {window}" if window else "")] = found
            if not found < 1e-2:  # not a number is wrong too
                wrong.append(f"{name}, {keys} key heads, window {window}: error {found}")
    return {"errors": errors, "wrong": wrong} | ({} if miniature else attention_speed(device))


def attention_error(lengths, heads: int, keys: int, size: int, dtype, window, device) -> float:
    """Largest relative error of output and gradients."""
    torch.manual_seed(len(lengths) + keys)
    tokens = sum(lengths)
    leaves = [torch.randn(1, count, tokens, size, device=device, dtype=dtype) for count in (heads, keys, keys)]
    weight = torch.randn(1, tokens, heads, size, device=device, dtype=dtype)
    results = []
    for attend, kind in ((packed, dtype), (reference, torch.float64)):
        inputs = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        out = attend(*inputs, lengths, window)
        results.append([out, *torch.autograd.grad((out * weight.to(kind)).sum(), inputs)])
    return max(
        ((found.double() - wanted).norm() / wanted.norm()).item() for found, wanted in zip(*results, strict=True)
    )


def packed(query, key, value, lengths, window):
    """The training's own function, as the model calls it."""
    from llava.train.step.packing import packed_attention

    borders = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(query.device)
    return packed_attention(
        None, query, key, value, None, scaling=query.shape[-1] ** -0.5, cu_seq_lens_q=borders,
        max_length_q=max(lengths), sliding_window=window,
    )[0]  # fmt: skip


def reference(query, key, value, lengths, window):
    """Softmax written out, sample by sample."""
    times = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    outs = []
    for q, k, v in zip(*(tensor.split(list(lengths), 2) for tensor in (query, key, value)), strict=True):
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        seen = seen if window is None else seen.triu(1 - window)
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        outs.append(scores.softmax(-1) @ v)
    return torch.cat(outs, 2).transpose(1, 2)


def attention_speed(device) -> dict:
    """Milliseconds of one layer's attention over a pack, 32 heads of 128, bf16."""
    heads, size = 32, 128
    q, k, v = torch.randn(3, 1, heads, sum(LENGTHS), size, device=device, dtype=torch.bfloat16).requires_grad_()
    out = packed(q, k, v, LENGTHS, None)
    weight = torch.randn_like(out)
    with torch.no_grad():
        forward = milliseconds(lambda: packed(q, k, v, LENGTHS, None))
    both = milliseconds(lambda: (packed(q, k, v, LENGTHS, None) * weight).sum().backward())
    operations = 4 * size * heads * sum(length**2 / 2 for length in LENGTHS)
    return {
        "forward_ms": forward,
        "forward_and_backward_ms": both,
        "forward_tflops": operations / forward / 1e9,
    }


def ceilings(miniature: bool) -> dict:
    """TFLOP/s of bf16 products at a 7B's shapes, and TB/s of a large copy (bytes read and written)."""
    device = device_of(miniature)
    scale = 64 if miniature else 1
    shapes = {
        "8192 x 8192 x 8192": (8192, 8192, 8192),
        "attention 4096 x 4096": (4096, 4096, 4096),
        "MLP up 4096 x 11008": (4096, 4096, 11008),
        "MLP down 11008 x 4096": (4096, 11008, 4096),
        "head 4096 x 32000": (4096, 4096, 32000),
        "head 4096 x 32003": (4096, 4096, 32003),
        "head 4096 x 32064": (4096, 4096, 32064),
    }
    products = {}
    for name, (rows, inner, columns) in shapes.items():
        left = torch.randn(rows // scale, inner // scale, device=device).bfloat16()
        right = torch.randn(columns // scale, inner // scale, device=device).bfloat16()
        spent = milliseconds(partial(torch.nn.functional.linear, left, right), miniature=miniature)
        products[name] = 2 * rows * inner * columns / scale**3 / spent / 1e9
    return {"product_tflops": products, "copy_tb_per_s": copy_rate(miniature)}


def copy_rate(miniature: bool) -> float:
    """TB/s of a large copy, bytes read and written."""
    source = torch.randn((1 << 16 if miniature else 1 << 30), device=device_of(miniature))
    target = torch.empty_like(source)
    spent = milliseconds(lambda: target.copy_(source), miniature=miniature)
    return 2 * source.nbytes / spent / 1e9


VARIANTS: dict[str, dict] = {
    "": {},
    "torch's kernels, ": {"working_fused": lambda _: None},
    "gathered pages, ": {"working_kernel": lambda *_: GATHERED},
}
"""What stands in for the runner's choices: nothing, no kernels of this project between products, none over pages."""


def decode(miniature: bool) -> dict:
    """The engine's milliseconds per step, tokens per second and share of the memory's bandwidth (weights, keys and
    values read once, at the rate of copies), 7B in bf16, prompts of 300; also without the project's own kernels."""
    loaded = answering_model(miniature)
    steps, batches = (4, (1, 2)) if miniature else (64, (1, 32, 64))
    rate = copy_rate(miniature)
    numbers: dict = {"copy_tb_per_s": rate}
    for variant, changes in VARIANTS.items():
        for batch in batches if not changes else batches[:2]:
            numbers[f"{variant}batch {batch}"] = decoding(loaded, batch, steps, changes, rate)
    return numbers


def decoding(loaded, batch: int, steps: int, changes: dict, rate: float) -> dict:
    """Of one batch size; the cache's memory is free again at the end."""
    from llava.generation import Engine

    with mock.patch.multiple("llava.generation.runner", **changes) if changes else nullcontext():
        engine = Engine(
            loaded, max_batch_size=batch, cache_bytes=batch * 400 * 2**20 + 2**28, prefix_bytes=0, max_prefill=1 << 15
        )
    runner = engine.scheduler.runner
    generate(engine, batch, steps + 1)  # kernels are compiled, graphs captured
    first = min(generate(engine, batch, 1) for _ in range(2))
    whole = min(generate(engine, batch, steps + 1) for _ in range(2))
    step = (whole - first) / steps
    model = loaded.model
    read = sum(one.nbytes for one in (*model.get_model().layers.parameters(), model.lm_head.weight))
    read += batch * (min(300, engine.context_len // 2) + steps / 2) * runner.bytes_per_position
    found = {
        "step_ms": step * 1e3, "tokens_per_second": batch / step, "prefill_s": first,
        "bandwidth_share": read / step / (rate * 1e12),
        "kernel": runner.kernel.name if runner.kernel else "rows",
    }  # fmt: skip
    captured = runner.decoder._captured if runner.decoder is not None else {}
    if captured:
        _, graph, _ = captured[max(captured)]
        found |= {"graph_ms": milliseconds(graph.replay), "kernels": kernels_of(graph.replay)}
    return found


def kernels_of(work, most: int = 9) -> list[str]:
    """The kernels that take most of the GPU's time in one run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    return [f"{row.self_device_time_total / 1e3:8.3f} ms {row.count:5} x {row.key[:90]}" for row in rows[:most]]


def generate(engine, batch: int, tokens: int) -> float:
    """Seconds of `batch` answers of `tokens` tokens."""
    from llava.generation import Request, SamplingParams

    random = np.random.default_rng(batch)
    length = min(300, engine.context_len // 2)
    sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    prompts = random.integers(3, len(engine.tokenizer), (batch, length))
    requests = [Request(ids.tolist(), sampling=sampling) for ids in prompts]
    synchronize(engine.model.device)
    started = time.perf_counter()
    answers = engine.generate(requests)
    spent = time.perf_counter() - started
    if any(len(answer.token_ids) != tokens for answer in answers):
        raise RuntimeError(f"an answer has {len(answers[0].token_ids)} tokens in place of {tokens}")
    return spent


def answering_model(miniature: bool):
    """A model of random weights with a 7B's shape, its tokenizer grown to 32,000 tokens."""
    from llava.model import LlavaLlamaForCausalLM, load_pretrained_model
    from tests.tiny import make_llava

    with tempfile.TemporaryDirectory() as folder:
        tiny = load_pretrained_model(make_llava(Path(folder)), device="cpu")
    if miniature:
        return tiny
    tokenizer, config = tiny.tokenizer, tiny.model.config
    tokenizer.add_tokens([f"token{number}" for number in range(32000 - len(tokenizer))])
    config.update({
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 4096,
        "initializer_range": 0.02,
    })  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlavaLlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return tiny._replace(model=model.eval(), context_len=4096)


def milliseconds(work, times: int = 20, miniature: bool = False) -> float:
    """Median of `times` runs after three, by the GPU's own clock."""
    if miniature:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    for _ in range(3):
        work()
    spent = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return statistics.median(spent)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
