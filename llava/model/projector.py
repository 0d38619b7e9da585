"""The projector: from the vision tower's features to the language model's embeddings."""

import re

from torch import nn

from llava.errors import LlavaError

MOST_LAYERS = 16


def build_projector(projector_type: str, vision_size: int, hidden_size: int) -> nn.Module:
    """`linear`, `mlpNx_gelu` (N Linear layers with GELU between, keys `0`, `2`, …) or `identity`.

    Input `[..., vision_size]`, output `[..., hidden_size]`; the parameters are initialised as torch does.

    Raises:
        LlavaError: an unknown type, more than `MOST_LAYERS` layers, or `identity` between different widths.
    """
    if projector_type == "linear":
        return nn.Linear(vision_size, hidden_size)
    if projector_type == "identity":
        if vision_size != hidden_size:
            raise LlavaError(
                f"mm_projector_type identity needs tower and language model of one width, "
                f"but they have {vision_size} and {hidden_size}; use linear or mlp2x_gelu"
            )
        return nn.Identity()
    depth = _mlp_depth(projector_type)
    layers: list[nn.Module] = [nn.Linear(vision_size, hidden_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)


def _mlp_depth(projector_type: str) -> int:
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector_type)
    if not match:
        raise LlavaError(
            f"unknown mm_projector_type {projector_type!r}; use linear, mlp2x_gelu "
            f"(or another number of layers) or identity"
        )
    digits = match[1]
    if len(digits) > len(str(MOST_LAYERS)) or int(digits) > MOST_LAYERS:
        raise LlavaError(f"mm_projector_type {projector_type:.40}: a projector has at most {MOST_LAYERS} layers")
    return int(digits)
