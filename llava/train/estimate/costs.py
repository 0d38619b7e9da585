"""What an operator costs on a GPU: a roofline of floating-point operations and bytes moved.

A kernel takes as long as its operations at the rate of matrix products, or its bytes at the rate of copies, whichever
is longer; the host starts one every 10 µs at best. Collectives overlap with the computation, as in FSDP.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llava.train.estimate.eight_bit import product_flops
from llava.train.step.hardware import (
    ATTENTION_SHARE,
    GPUS_PER_MACHINE,
    KERNEL_SECONDS,
    NETWORK_GB_PER_SECOND,
    Gpu,
)

aten = torch.ops.aten
FREE = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
        aten.lift_fresh, aten.detach, aten.view, aten.set_, aten.resize_, aten._reshape_alias,
        aten.is_pinned}  # fmt: skip
"""Operators without a kernel, besides views."""
ONLY_WRITING = {aten.copy_, aten.zero_, aten.fill_, aten.zeros_like, aten.ones_like, aten.new_zeros}
"""Operators that don't read what they change, or what they take a shape from."""
COLLECTIVES = ("c10d", "_c10d_functional", "_dtensor")


@dataclass
class Work:
    """Of one operator, or a sum of several."""

    flops: float = 0
    """Floating-point operations of matrix products and attention."""
    bytes: float = 0
    """Read and written."""
    sent: float = 0
    """Bytes that this process sends to others."""
    kernels: int = 0
    attention: str = ""
    """Name of the attention kernel, if it is one."""

    def __iadd__(self, other: "Work") -> "Work":
        for field in fields(self):
            if field.name != "attention":
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self


@dataclass
class Clock:
    """Time of host, GPU and links, in seconds. The host runs ahead of the GPU until it has to wait."""

    gpu: Gpu
    processes: int = 1
    host: float = 0.0
    device: float = 0.0
    links: float = 0.0

    def run(self, work: Work) -> None:
        """Start an operator's kernels and let the GPU carry them out."""
        if work.sent:
            self.links = max(self.links, self.host) + work.sent / self.rate_of_links
        if work.kernels:
            self.host += KERNEL_SECONDS * work.kernels
            self.device = max(self.device, self.host) + self.seconds(work)

    def seconds(self, work: Work) -> float:
        """That the GPU takes for one operator."""
        rate = self.gpu.gemm_tflops * 1e12 * (ATTENTION_SHARE if work.attention else 1)
        return max(work.flops / rate, work.bytes / (self.gpu.terabytes_per_second * 1e12))

    def wait(self) -> None:
        """The host waits for the GPU."""
        self.host = max(self.host, self.device)

    @property
    def now(self) -> float:
        return max(self.host, self.device, self.links)

    @property
    def rate_of_links(self) -> float:
        within = self.processes <= GPUS_PER_MACHINE
        return 1e9 * (self.gpu.link_gb_per_second if within else NETWORK_GB_PER_SECOND)


def work_of(function, args, kwargs, inputs, outputs, out, pairs: int) -> Work:
    """An operator's work by its arguments and results (`out`; `inputs` and `outputs`: the tensors among them).

    `pairs` is how many pairs of positions attend where samples are joined.
    """
    packet = function._overloadpacket
    if function.namespace in COLLECTIVES:
        return Work(sent=_sent(packet.__name__, inputs, outputs))
    if function.is_view or packet in FREE or (not outputs and not inputs):
        return Work()
    moved = _bytes_of(function, args, kwargs, inputs, outputs)
    if packet in ATTENTION:
        return Work(ATTENTION[packet](args, outputs, pairs), moved, kernels=1, attention=packet.__name__)
    if packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
    else:
        flops = product_flops(function._schema.name, args)
    return Work(flops, moved, kernels=1)


def size_of(tensor: torch.Tensor) -> int:
    """Bytes that reading it whole takes; an expanded tensor's are read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _bytes_of(function, args, kwargs, inputs, outputs) -> int:
    written = outputs
    if function._schema.is_mutable:
        named = dict(zip((argument.name for argument in function._schema.arguments), args)) | kwargs
        changed = [argument.name for argument in function._schema.arguments
                   if argument.alias_info is not None and argument.alias_info.is_write]  # fmt: skip
        written = [leaf for leaf in tree_leaves([named.get(name) for name in changed])
                   if isinstance(leaf, torch.Tensor)]  # fmt: skip
    if function._overloadpacket in ONLY_WRITING:
        inputs = [tensor for tensor in inputs if all(tensor is not one for one in written)]
    return sum(size_of(tensor) for tensor in {id(one): one for one in inputs}.values()) + sum(map(size_of, written))


def _sent(name: str, inputs, outputs) -> float:
    sizes = [size_of(tensor) for tensor in [*inputs, *outputs]]
    if not sizes or "barrier" in name or "wait" in name:
        return 0.0
    # A ring passes the whole tensor through each link once, and twice where all get a sum.
    return max(sizes) * (2.0 if "allreduce" in name or "all_reduce" in name else 1.0)


def _sdpa(times: float, causal_at: int) -> Callable:
    def flops(args, outputs, pairs):
        query, key = (args[0], args[1]) if times == 4 else (args[1], args[2])
        batch, heads, length, size = query.shape
        causal = bool(args[causal_at]) if len(args) > causal_at else False
        return times * batch * heads * length * key.shape[2] * size / (2 if causal else 1)

    return flops


def _joined(times: float) -> Callable:
    def flops(args, outputs, pairs):
        query = args[0] if times == 4 else args[1]
        return times * pairs * query.shape[-2] * query.shape[-1]

    return flops


ATTENTION: dict[object, Callable] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa(4, 4),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa(10, 7),
    aten._scaled_dot_product_fused_attention_overrideable: _sdpa(4, 5),
}
"""Floating-point operations of attention kernels: two products forward, five backward, of two operations each."""


def _add_joined() -> None:
    import torch.nn.attention.varlen

    ATTENTION[torch.ops.torch_attn._varlen_attn] = _joined(4)
    ATTENTION[torch.ops.torch_attn._varlen_attn_backward] = _joined(10)


_add_joined()
