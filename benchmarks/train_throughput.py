"""Training throughput: padded, grouped and packed batches of the same samples, side by side in one run.

Text lengths are log-normal (mean 300, standard deviation 250, clipped to 20–1500), 90 % of the samples have 256
image positions; a global batch is 8 samples. Prints real tokens per second, MFU and the ratios.
"""

import argparse
import time

import numpy as np
import torch
from checkout import add_json_flag, show

IMAGE_POSITIONS, BATCH = 256, 8
SIZES = {  # hidden, layers, middle, heads, vocabulary, steps
    "cpu": (128, 4, 344, 2, 1000, 30),
    "7b": (4096, 32, 11008, 32, 32000, 20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="7b" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-tflops", type=float, help="of this machine; default: measured with a large product")
    add_json_flag(parser)
    args = parser.parse_args()
    result = measure(args.size, args.seed, args.peak_tflops)
    show(f"size {args.size}", result, args.json)


def measure(size: str, seed: int, peak: float | None) -> dict[str, float]:
    hidden, layers, middle, heads, vocabulary, steps = SIZES[size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak or measured_peak(device)
    texts, with_image = draw_lengths(steps * BATCH, seed)
    samples = make_samples(texts, with_image, vocabulary, seed)
    model = make_model(hidden, layers, middle, heads, vocabulary, device, seed)
    if device.type == "cuda":
        model.gradient_checkpointing_enable()
    orders = {"padded": random_order(samples, seed), "grouped": grouped_order(samples, seed)}
    orders["packed"] = orders["padded"]
    check = compare_losses(model, samples, orders["padded"][:BATCH], device)
    rates = {name: throughput(model, samples, order, name == "packed", device) for name, order in orders.items()}
    from llava.train.progress import flops_per_token

    per_token = flops_per_token(model)
    result = {f"{name}_tokens_per_second": rate for name, rate in rates.items()}
    result |= {f"{name}_mfu": rate * per_token / (peak * 1e12) for name, rate in rates.items()}
    result |= {
        "peak_tflops": peak,
        "real_tokens": float(sum(len(sample.input_ids) for sample in samples)),
        "packed_loss_difference": check,
        "packed_over_padded_ratio": rates["packed"] / rates["padded"],
        "packed_over_grouped_ratio": rates["packed"] / rates["grouped"],
    }
    return result


def draw_lengths(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(text lengths, whether there is an image)."""
    random = np.random.default_rng(seed)
    mean, deviation = 300.0, 250.0
    variance = np.log(1 + (deviation / mean) ** 2)
    lengths = random.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)
    return lengths.clip(20, 1500).astype(int), random.random(count) < 0.9


def make_samples(texts, with_image, vocabulary: int, seed: int) -> list:
    from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
    from llava.train.data.dataset import Sample

    random = np.random.default_rng(seed + 1)
    samples = []
    for length, image in zip(texts, with_image):
        ids = random.integers(3, vocabulary, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 3, IGNORE_INDEX, ids)
        if image:
            ids = np.insert(ids, 4, np.full(IMAGE_POSITIONS, IMAGE_TOKEN_INDEX))
            labels = np.insert(labels, 4, np.full(IMAGE_POSITIONS, IGNORE_INDEX))
        samples.append(Sample(ids.astype(np.int32), labels.astype(np.int32), ["a"] if image else [], False))
    return samples


def make_model(hidden, layers, middle, heads, vocabulary, device, seed: int):
    """A LLaVA of random weights with a minimal tower: features come as from the cache, the tower never runs."""
    from llava.model import LlavaLlamaConfig, LlavaLlamaForCausalLM

    torch.manual_seed(seed)
    config = LlavaLlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096,
        mm_vision_config={"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
                          "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 14},
        mm_vision_select_layer=-2, mm_projector_type="linear",
    )  # fmt: skip
    with device:  # a 7B's weights would take minutes on the CPU
        model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().requires_grad_(False)
    return model.train()


def random_order(samples, seed: int) -> list[int]:
    from llava.train.data.sampler import EpochSampler

    return list(EpochSampler(len(samples), seed))


def grouped_order(samples, seed: int) -> list[int]:
    from llava.train.data.sampler import EpochSampler

    lengths = [len(sample.input_ids) for sample in samples]
    kinds = [bool(sample.images) for sample in samples]
    return list(EpochSampler(len(samples), seed, lengths=lengths, is_image=kinds, batch_size=BATCH))


class Features:
    """Stands for the feature cache."""

    def take(self, rows):
        return torch.zeros(len(rows), IMAGE_POSITIONS, 64)


def batch_of(samples, numbers, packed: bool, device) -> tuple[dict, int]:
    from llava.train.data.collator import Collator
    from llava.train.trainer import META_KEYS

    items = [
        {"number": n, "sample": samples[n], "skipped": None, "feature_rows": [0] * len(samples[n].images)}
        for n in numbers
    ]
    batch = Collator(0, packing=packed, cache=Features())(items)
    meta = {key: batch.pop(key) for key in META_KEYS}
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}, meta["num_tokens"]


def set_attention(model, packed: bool) -> None:
    from llava.train.step.packing import use_packed_attention

    if packed:
        use_packed_attention(model.config)
    else:
        model.config._attn_implementation = "sdpa"


def loss_of(model, batch, device) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return model(**batch).loss


def compare_losses(model, samples, numbers, device) -> float:
    losses = []
    for packed in (False, True):
        set_attention(model, packed)
        with torch.no_grad():
            losses.append(loss_of(model, batch_of(samples, numbers, packed, device)[0], device).item())
    return abs(losses[0] - losses[1])


def throughput(model, samples, order, packed: bool, device) -> float:
    """Real tokens per second of whole training steps, after two to warm up."""
    set_attention(model, packed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    tokens, started = 0, 0.0
    for number, numbers in enumerate([*batches[:2], *batches]):
        if number == 2:
            synchronize(device)
            tokens, started = 0, time.perf_counter()
        batch, count = batch_of(samples, numbers, packed, device)
        loss_of(model, batch, device).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += count
    synchronize(device)
    return tokens / (time.perf_counter() - started)


def measured_peak(device) -> float:
    """TFLOP/s of a large product in the training's precision; the data sheet's where the GPU is known."""
    from llava.train.progress import peak_tflops

    if known := peak_tflops(None):
        return known
    matrix = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    matrix @ matrix
    synchronize(device)
    started = time.perf_counter()
    for _ in range(8):
        matrix @ matrix
    synchronize(device)
    return 8 * 2 * 2048**3 / (time.perf_counter() - started) / 1e12


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
