"""How many operations a decoder layer takes, forward and backward: under autocast, as it is now, and compiled.

python benchmarks/layer_operations.py --json out.json

A packed batch of eight samples goes through a LLaMA layer; sizes don't change the numbers. Views don't count. Without a
GPU: the kernel for joined samples and the compiled graphs are those of the dry run, on tensors without content.
"""

import argparse

import torch
from checkout import add_json_flag, show
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llava.train.estimate.compiled import DryCompiler
from llava.train.estimate.costs import FREE, Clock
from llava.train.estimate.tracker import Tracker
from llava.train.step import gpu
from llava.train.step.compute import compile_layers
from llava.train.step.hardware import GPUS
from llava.train.step.packing import use_packed_attention

SAMPLES, TOKENS = 8, 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json_flag(parser)
    args = parser.parse_args()
    rows = {"autocast": _counted(torch.float32), "half precision": _counted(torch.bfloat16), "compiled": _compiled()}
    results = {f"{name.replace(' ', '_')}_{way}": count for name, row in rows.items() for way, count in row.items()}
    show("operations of a decoder layer", results, args.json)


class Counting(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.namespace != "prim" and function._overloadpacket not in FREE:
            self.count += 1
        return function(*args, **kwargs or {})


def _layers(dtype: torch.dtype) -> tuple[torch.nn.Module, LlamaConfig]:
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=1)
    use_packed_attention(config)
    model = torch.nn.Module()
    torch.set_default_dtype(dtype)  # tensors without content can't be cast in place
    model.layers = torch.nn.ModuleList([LlamaDecoderLayer(config, 0)])
    torch.set_default_dtype(torch.float32)
    return model.train(), config


def _inputs(config: LlamaConfig, dtype: torch.dtype) -> dict:
    hidden = torch.randn(1, TOKENS, config.hidden_size, dtype=dtype, requires_grad=True)
    cos, sin = LlamaRotaryEmbedding(config)(hidden, torch.arange(TOKENS)[None])
    borders = torch.arange(0, TOKENS + 1, TOKENS // SAMPLES, dtype=torch.int32)
    return {"hidden_states": hidden, "position_embeddings": (cos, sin), "cu_seq_lens_q": borders,
            "max_length_q": TOKENS // SAMPLES}  # fmt: skip


def _counted(dtype: torch.dtype) -> dict[str, int]:
    """Of a layer with weights of this dtype; float32: cast by autocast, attention sample by sample."""
    if dtype == torch.float32:
        model, config = _layers(dtype)
        inputs = _inputs(config, dtype)
        with Counting() as forward, torch.autocast("cpu", torch.bfloat16):
            out = model.layers[0](**inputs)
        with Counting() as backward:
            out.float().sum().backward()
        return {"forward": forward.count, "backward": backward.count}
    with gpu.describe(GPUS["h100"], torch.compile), FakeTensorMode(allow_non_fake_inputs=True):
        model, config = _layers(dtype)
        inputs = _inputs(config, dtype)
        with Counting() as forward:
            out = model.layers[0](**inputs)
        with Counting() as backward:
            out.sum().backward()
    return {"forward": forward.count, "backward": backward.count}


def _compiled() -> dict[str, int]:
    """Kernels of a compiled layer: chains of operators between matrix products and attention are one each."""
    tracker = Tracker(Clock(GPUS["h100"]))
    with (
        gpu.describe(GPUS["h100"], DryCompiler(tracker.fused, tracker.paused)),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model, config = _layers(torch.bfloat16)
        compile_layers(model)
        inputs = _inputs(config, torch.bfloat16)
        with tracker:
            out = model.layers[0](**inputs)
            forward = tracker.work.kernels
            out.sum().backward()
    return {"forward": forward, "backward": tracker.work.kernels - forward}


if __name__ == "__main__":
    main()
