"""LLaVA's name of `llava.model.projector.build_projector`."""

from typing import Any

from torch import nn

from llava.model.projector import build_projector


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """The projector of a LLaVA config's `mm_projector_type`, `mm_hidden_size` and `hidden_size`, with random weights.

    `delay_load` and further arguments are LLaVA's and decide nothing here either.
    """
    kind = getattr(config, "mm_projector_type", None) or "linear"
    return build_projector(kind, config.mm_hidden_size, config.hidden_size)
