"""GPUs that a run can be predicted for: the one table of their constants."""

import re
from dataclasses import dataclass

from llava.errors import LlavaError

GB = 1e9
CONTEXT_GB = 1.2
"""Of a GPU's memory, for the CUDA context and the libraries' workspaces."""
FRAGMENTATION = 1.05
"""What the allocator reserves over what is in use."""
KERNEL_SECONDS = 10e-6
"""That the host needs to start a kernel, where nothing is captured in a CUDA graph."""
ATTENTION_SHARE = 0.25
"""Of the rate of matrix products that attention within short samples reaches."""
NETWORK_GB_PER_SECOND = 25.0
"""Of one GPU, to those of other machines."""
GPUS_PER_MACHINE = 8
OPTIMIZER_BYTES = {"8bit": 2, "4bit": 1, "adafactor": 0.1, "sgd": 0, "lion": 4}
"""Per trained parameter, by a part of the optimizer's name; AdamW's two float32 moments (8) if none is in it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as a prediction takes it."""

    name: str
    memory_gb: float
    """As the driver reports it, 1e9 bytes."""
    peak_tflops: float
    """Dense bf16 by the data sheet: what MFU is a share of."""
    gemm_tflops: float
    """What matrix products at a 7B's shapes reach."""
    terabytes_per_second: float
    """What copies reach."""
    link_gb_per_second: float
    """Of one GPU to the others of its machine."""
    is_scaled: bool = False
    """Rates are the data sheet's, scaled as the H200's measured ones are."""
    has_bf16: bool = True
    """Else half precision is fp16."""

    @property
    def usable_gb(self) -> float:
        """The largest peak that fits."""
        return (self.memory_gb - CONTEXT_GB) / FRAGMENTATION


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 42.4, 312, 240, 1.3, 200),
        Gpu("a100-80g", 85.0, 312, 240, 1.7, 200),
        Gpu("h100", 85.0, 989, 660, 2.85, 350),
        Gpu("h200", 150.0, 989, 680, 4.0, 350),
        Gpu("a10", 23.6, 125, 86, 0.50, 12, is_scaled=True),
        Gpu("3090", 25.4, 71, 49, 0.78, 12, is_scaled=True),
        Gpu("4090", 25.3, 165, 113, 0.84, 12, is_scaled=True),
        Gpu("a6000", 51.0, 155, 107, 0.64, 12, is_scaled=True),
        Gpu("l4", 23.6, 121, 83, 0.25, 12, is_scaled=True),
        Gpu("l40", 47.7, 181, 124, 0.72, 12, is_scaled=True),
        Gpu("l40s", 47.7, 362, 249, 0.72, 12, is_scaled=True),
        Gpu("t4", 15.6, 65, 45, 0.27, 6, is_scaled=True, has_bf16=False),
        Gpu("v100-16g", 16.9, 125, 86, 0.75, 117, is_scaled=True, has_bf16=False),
        Gpu("v100-32g", 34.0, 125, 86, 0.75, 117, is_scaled=True, has_bf16=False),
    )
}

_OTHER_FORMS = {"H100 PCIE": 756, "H100 NVL": 835, "V100 PCIE": 112, "A10G": 70, "3090 TI": 80}
_UNKNOWN_FORMS = {"LAPTOP", "MOBILE", "TI", "SUPER", "D"}
PEAK_TFLOPS = {name.split("-")[0].upper(): gpu.peak_tflops for name, gpu in GPUS.items()} | _OTHER_FORMS
"""bf16 (V100, T4: fp16) dense peak of known GPUs, TFLOP/s, from their data sheets, by words of the driver's name.

GeForce cards by their rate with sums in float32, which is half of the one with sums in fp16."""


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, whatever its case; `rtx` or `nvidia` may stand before it.

    Raises:
        LlavaError: the table has none; it lists those it has.
    """
    known = re.sub("nvidia|geforce|rtx", "", name.lower()).strip(" -_")
    if known not in GPUS:
        raise LlavaError(f"--gpu {name}: unknown; use one of {', '.join(GPUS)}")
    return GPUS[known]


def peak_of(device_name: str) -> float | None:
    """The peak of a GPU by the driver's name for it (`NVIDIA A100-SXM4-40GB`), TFLOP/s; None if it isn't known."""
    words = set(re.findall(r"[A-Z0-9]+", device_name.upper()))
    known = [name for name in PEAK_TFLOPS if words.issuperset(name.split())]
    best = max(known, key=lambda name: len(name.split()), default=None)
    if best is None or _UNKNOWN_FORMS & words - set(best.split()):
        return None
    return float(PEAK_TFLOPS[best])
