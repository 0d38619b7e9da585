"""Whatever of a run depends on the GPU asks here: this machine's, or, in a dry run, the one that is described."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llava.model.varlen_attention import HALVES, Kernel, installed_kernel, torch_kernel
from llava.train.step.hardware import GB, Gpu, peak_of

# Plain variables: compiled layers ask too, and torch up to 2.11 compiles no call of a ContextVar.
_described: Gpu | None = None
_compiler: Callable = torch.compile


@contextmanager
def describe(gpu: Gpu, compiler: Callable) -> Iterator[None]:
    """Within, a run is set up for this GPU, whatever the machine has; its tensors lie on the CPU without content.

    `compiler` is called as torch.compile.
    """
    global _described, _compiler
    before = _described, _compiler
    _described, _compiler = gpu, compiler
    try:
        yield
    finally:
        _described, _compiler = before


def is_described() -> bool:
    """Whether this is a dry run."""
    return _described is not None


def has_gpu() -> bool:
    return is_described() or torch.cuda.is_available()


def is_on_gpu(device: torch.device) -> bool:
    """Whether tensors of this device stand for a GPU's."""
    return is_described() or device.type == "cuda"


def has_bf16() -> bool:
    """Whether the GPU computes in bfloat16; every one that can be described does."""
    return is_described() or torch.cuda.is_bf16_supported(including_emulation=False)


def name() -> str:
    return torch.cuda.get_device_name() if _described is None else _described.name


def memory_bytes(device: torch.device) -> int:
    if _described is None:
        return torch.cuda.get_device_properties(device).total_memory
    return int(_described.memory_gb * GB)


def peak_tflops() -> float | None:
    """The GPU's peak in half precision, TFLOP/s; None without one, or if it isn't known."""
    if _described is not None:
        return _described.peak_tflops
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def compiler() -> Callable:
    """torch.compile, or what stands for it in a dry run."""
    return _compiler


def attention_kernel() -> Kernel | None:
    """The kernel for joined samples; None without a GPU. A dry run takes torch's own, whose shapes all kernels have."""
    if is_described():
        from torch.nn.attention.varlen import varlen_attn

        return torch_kernel(varlen_attn)
    return installed_kernel() if torch.cuda.is_available() else None


def takes_kernel(*tensors: torch.Tensor) -> bool:
    """Whether a kernel can take these tensors: on a GPU, at least one of them in half precision."""
    return is_on_gpu(tensors[0].device) and any(tensor.dtype in HALVES for tensor in tensors)
