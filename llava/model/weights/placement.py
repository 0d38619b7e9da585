"""Where a model goes: one device, or its layers spread over several GPUs."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

from llava.errors import LlavaError, library_errors
from llava.model.weights.files import WeightFiles

if TYPE_CHECKING:
    from llava.model.language_model import LlavaForCausalLM

log = logging.getLogger(__name__)

_HEADROOM = 1.2
"""A GPU must hold this many times the weights: activations and cache need memory too."""


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(device: str | torch.device | None) -> torch.device:
    """The named device, else the best there is.

    Raises:
        LlavaError: it isn't there, or no name of a device.
    """
    with library_errors(f"the device {str(device)!r} can't be used here; leave it out for the best there is"):
        found = torch.device(device or best_device())
        torch.empty(1, device=found)
    return found


def choose_dtype(
    dtype: str | torch.dtype | None, config, weights: WeightFiles, device: torch.device | None = None
) -> torch.dtype:
    """The named dtype, else the checkpoint's own: the config's, or that of most of its weights.

    In place of the checkpoint's own bfloat16 a GPU that doesn't compute in it gets float16.
    """
    if isinstance(dtype, str):
        dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype)
        if dtype is None:
            raise LlavaError("dtype must be float32, float16 or bfloat16")
    if dtype is not None:
        return dtype
    own = config.dtype
    if not isinstance(own, torch.dtype):
        stored = Counter(weights.dtype(name) for name in weights if weights.dtype(name).is_floating_point)
        own = stored.most_common(1)[0][0] if stored else torch.float32
    if own == torch.bfloat16 and device is not None and device.type == "cuda" and not _has_bf16():
        log.warning("this GPU doesn't compute in bfloat16: the model is loaded in float16")
        return torch.float16
    return own


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


class Placement:
    """The device of each weight. `device_map` spreads the model; None decides by the free memory of the first GPU."""

    def __init__(
        self,
        model: "LlavaForCausalLM",
        device: torch.device,
        dtype: torch.dtype,
        device_map: str | dict[str, Any] | None = None,
        bits: int = 0,
    ):
        self.device = device
        self.map: dict[str, Any] | None = None
        if device_map is None and device.type == "cuda" and device.index is None and not bits:
            device_map = "auto" if _too_large(model, dtype) else None
        if isinstance(device_map, str):
            if device_map != "auto":
                raise LlavaError(f"device_map must be auto or a map of modules to devices, not {device_map!r}")
            device_map = _spread(model, dtype)
        if device_map:
            if "disk" in device_map.values():
                raise LlavaError("the model doesn't fit into the memory of GPUs and CPU; use load_8bit or load_4bit")
            self.map = device_map

    @property
    def device_of(self) -> Callable[[str], torch.device]:
        """The device of a weight, by its name."""
        return partial(_device_in, self.map) if self.map else lambda name: self.device

    def dispatch(self, model: "LlavaForCausalLM") -> None:
        """Let inputs follow the layers over several devices."""
        if self.map and len(set(self.map.values())) > 1:
            dispatch_model(model, device_map=self.map)


def _device_in(device_map: dict[str, Any], name: str) -> torch.device:
    prefix = name
    while prefix not in device_map:
        if not prefix:
            raise LlavaError(f"device_map names no device for {name}")
        prefix = prefix.rpartition(".")[0]
    return torch.device(device_map[prefix])


def _too_large(model: "LlavaForCausalLM", dtype: torch.dtype) -> bool:
    if torch.cuda.device_count() < 2:
        return False
    free, _ = torch.cuda.mem_get_info()
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize * _HEADROOM > free


def _spread(model: "LlavaForCausalLM", dtype: torch.dtype) -> dict[str, Any]:
    # The tower stays in one piece: its modules are called one by one.
    unsplit = [*(model._no_split_modules or ()), type(model.get_vision_tower()).__name__]
    memory = get_balanced_memory(model, dtype=dtype, no_split_module_classes=unsplit)
    found = infer_auto_device_map(model, max_memory=memory, dtype=dtype, no_split_module_classes=unsplit)
    log.info("spread over %s", ", ".join(sorted({str(device) for device in found.values()})))
    return dict(found)
