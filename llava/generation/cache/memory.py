"""How much memory the engine may take."""

import torch
from torch import nn

_SHARE = 0.5
_LEAST = 64 << 20


def cache_budget(model: nn.Module) -> int:
    """Bytes for keys and values: half of what is free on the model's (smallest) device now."""
    devices = {parameter.device for parameter in model.parameters()}
    return max(int(_SHARE * min(_free(device) for device in devices)), _LEAST)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds without using it is free for us too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    available: int = psutil.virtual_memory().available
    return available
