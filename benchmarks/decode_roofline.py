"""What a decoding step of a LLaMA-7B does on a GPU, counted on CUDA tensors without content, and how long that takes.

    python benchmarks/decode_roofline.py --json roofline.json

The engine's own step, operator by operator: dispatched operators of a layer that are no views, before anything is
compiled; whether the host waits or copies in a step; bytes moved over those of the weights and of keys and values, each
read once; and the share of the memory bandwidth that weights, keys and values are read at. A step replayed as a CUDA
graph costs the host one start; within the graph a kernel takes the GPU at least as long as a small one does.
"""

from collections import Counter
from functools import partial
from unittest import mock

import torch
from checkout import add_json_flag, show
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava.commandline import ArgumentParser, run, write_line
from llava.generation.attention.kernels import signatures
from llava.generation.cache.pages import PageCache
from llava.generation.decoding import DecodingState
from llava.generation.runner import Runner
from llava.generation.sampling import SamplingTable, TokenChooser
from llava.model.families import LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava.sampling_params import SamplingParams
from llava.train.estimate.costs import FREE, Clock, Work, work_of
from llava.train.estimate.tracker import WAITING
from llava.train.step.hardware import KERNEL_SECONDS, find_gpu

LAYERS = 32
SIZES = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
GRAPH_KERNEL_SECONDS = 2.0e-6
"""That a kernel takes at least where it is replayed in a graph."""
aten = torch.ops.aten
PICKING = {aten.index_select, aten.embedding, aten.gather}
"""They read as much of their first tensor as they give."""
PLACING = {aten.index_copy_, aten.scatter_}
"""They write as much as their last tensor holds."""


class Counting(TorchDispatchMode):
    """Operators, their bytes, and where the host waits; entered inside a FakeTensorMode."""

    def __init__(self, keys_and_values: float):
        super().__init__()
        self.keys_and_values = keys_and_values
        """Bytes that one layer's attention reads."""
        self.names: Counter[str] = Counter()
        self.works: list[Work] = []
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function._overloadpacket
        out = function(*args, **kwargs)
        inputs, outputs = ([leaf for leaf in tree_leaves(one) if isinstance(leaf, torch.Tensor)]
                           for one in ((args, kwargs), out))  # fmt: skip
        devices = {one.device.type for one in (*inputs, *outputs)}
        if packet in WAITING or ("cuda" in devices and len(devices) > 1):
            self.syncs[packet.__name__] += 1
        if function.is_view or packet in FREE or function.namespace == "prim" or "cuda" not in devices:
            return out
        self.names[packet.__name__] += 1
        self.works.append(self._work(function, packet, args, kwargs, inputs, outputs, out))
        return out

    def _work(self, function, packet, args, kwargs, inputs, outputs, out) -> Work:
        work = work_of(function, args, kwargs, inputs, outputs, out, 0)
        if packet in PICKING:
            work.bytes = 2 * sum(one.nbytes for one in outputs)
        elif packet in PLACING:
            work.bytes = 2 * inputs[-1].nbytes
        elif work.attention:
            work.bytes = args[0].nbytes + outputs[0].nbytes + self.keys_and_values
        return work


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100", help="whose bandwidth it is")
    parser.add_argument("--context", type=int, default=600, help="positions of each row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 64])
    add_json_flag(parser)
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    gpu = find_gpu(args.gpu)
    numbers: dict[str, float] = {}
    steps = {}
    for batch in args.batches:
        first, second = (counted(batch, args.context, layers) for layers in (1, 2))
        layer = {name: count - first.names[name] for name, count in second.names.items() if count > first.names[name]}
        around = {name: 2 * count - second.names[name] for name, count in first.names.items()}
        steps[batch] = first, second
        if batch == 32 or "operations_per_layer" not in numbers:
            numbers["operations_per_layer"] = sum(layer.values())
            numbers["operations_around_layers"] = sum(count for count in around.values() if count > 0)
            numbers["host_syncs_per_step"] = sum(second.syncs.values())
            write_line(f"a layer: {', '.join(f'{name} x {count}' for name, count in sorted(layer.items()))}")
            write_line(f"the host: {dict(second.syncs)}")
    for batch, (first, second) in steps.items():
        of_layers = partial(whole, first, second)
        moved = of_layers(lambda one: sum(work.bytes for work in one.works))
        least = weights_bytes() + LAYERS * keys_and_values(batch, args.context)
        device = of_layers(lambda one: sum(max(Clock(gpu).seconds(w), GRAPH_KERNEL_SECONDS) for w in one.works))
        eager = max(device, KERNEL_SECONDS * of_layers(lambda one: len(one.works)))
        share = least / (gpu.terabytes_per_second * 1e12)
        numbers |= {
            f"bytes_over_least_batch_{batch}": moved / least,
            f"bandwidth_share_batch_{batch}": share / (device + KERNEL_SECONDS),
            f"bandwidth_share_without_graphs_batch_{batch}": share / eager,
            f"step_ms_batch_{batch}": (device + KERNEL_SECONDS) * 1e3,
        }
    show(f"decoding, LLaMA-7B, bf16, {gpu.name} at {gpu.terabytes_per_second} TB/s (copies)", numbers, args.json)


def whole(first: Counting, second: Counting, measure) -> float:
    """Of all layers, from steps of one layer and of two."""
    return measure(first) + (LAYERS - 1) * (measure(second) - measure(first))


def weights_bytes() -> int:
    """Of all that a step reads once: the layers, the last norm and the head."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    return 2 * (LAYERS * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden + SIZES["vocab_size"] * hidden)


def keys_and_values(batch: int, context: int) -> int:
    """Bytes of one layer's keys and values."""
    return 2 * 2 * batch * context * SIZES["hidden_size"]


def counted(batch: int, context: int, layers: int) -> Counting:
    """One step of `batch` rows, from tokens on the device to the next ones on the host."""
    model = empty_model(layers)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        runner = fake_runner(model, batch, context)
        state = DecodingState(batch, -(-(context + 1) // runner.cache.page), runner.device)
        state.positions.fill_(context - 1)
        choosers = [TokenChooser(SamplingParams()) for _ in range(batch)]
        table = SamplingTable(choosers, SIZES["vocab_size"], runner.device)
        step(runner, state, table)  # makes the cache's tensors
        counting = Counting(keys_and_values(batch, context))
        with counting:
            step(runner, state, table)
    return counting


def step(runner: Runner, state: DecodingState, table: SamplingTable) -> torch.Tensor:
    """As the scheduler's: logits, tokens, tokens into the state, one copy back."""
    chosen = table.choose(runner._decode(state))
    aten.copy_(state.tokens, chosen)  # the method asks the driver, which isn't there
    return chosen.cpu()


def empty_model(layers: int) -> LlavaLlamaForCausalLM:
    """In bf16, on meta."""
    config = LlavaLlamaConfig(**SIZES, num_hidden_layers=layers)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return LlavaLlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def fake_runner(model: LlavaLlamaForCausalLM, batch: int, context: int) -> Runner:
    """A runner over a model without content on a GPU, with the kernel whose signature names pages."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
                    held[name] = torch.nn.Parameter(new, requires_grad=False) if held is module._parameters else new
    position = 2 * 2 * model.config.num_hidden_layers * SIZES["hidden_size"]
    kernel = next(one for one in signatures() if one.name.startswith("torch"))
    # By torch's operators, which can be counted.
    choices = {"working_kernel": lambda *_: kernel, "working_fused": lambda *_: None}
    with mock.patch.multiple("llava.generation.runner", **choices):
        runner = Runner(model, None, batch * (context + 16) * position, 4096, max_rows=batch)
    assert isinstance(runner.cache, PageCache) and runner.decoder is not None
    return runner


if __name__ == "__main__":
    run(main)
