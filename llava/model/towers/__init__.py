"""Vision towers: images to patch features. One file per kind of tower, found here by itself.

A tower is a subclass of `VisionTower` in a module of this package; it says which folders and which configurations
are its own. `HuggingFaceVisionTower` takes any vision model of the library that no other tower takes.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

from llava.errors import LlavaError, library_errors
from llava.model.towers.base import VisionTower
from llava.model.towers.clip import KIND as CLIP
from llava.records import read_json

__all__ = [
    "CLIP",
    "TOWERS",
    "VisionTower",
    "build_vision_tower",
    "find_tower_class",
    "read_vision_config",
    "sketch_vision_tower",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

TOWERS: tuple[type[VisionTower], ...] = tuple(
    sorted(VisionTower.__subclasses__(), key=lambda tower: (not tower.kinds, tower.kinds))
)
"""All kinds of towers; the one that takes whatever no other does comes last."""


def build_vision_tower(config: Any) -> VisionTower:
    """The tower of a LLaVA config's `mm_vision_config`, with random weights.

    Raises:
        LlavaError: the library has no such vision model, the selected layer doesn't exist, or a class token is
            asked for that the tower doesn't have.
    """
    with library_errors("config.json describes no vision tower that can be built"):
        vision_config = _without_code(config.mm_vision_config or {})
        tower_class = find_tower_class(vision_config)
        tower = tower_class(vision_config, config.mm_vision_select_layer, config.mm_vision_select_feature)
    if tower.select_feature == "cls_patch" and not tower.prefix_tokens:
        kind = vision_config.get("model_type")
        raise LlavaError(f"mm_vision_select_feature cls_patch: the tower {kind!r} has no class token; use patch")
    return tower


def _without_code(vision_config: dict[str, Any]) -> dict[str, Any]:
    """Without the fields in which a file may name code of the hub that the library would fetch and run."""
    return {
        name: _without_code(value) if isinstance(value, dict) else value
        for name, value in vision_config.items()
        if not name.endswith("_implementation")
    }


def sketch_vision_tower(config: Any) -> VisionTower:
    """`build_vision_tower` without memory: to ask a tower about its shapes and names."""
    with torch.device("meta"):
        return build_vision_tower(config)


def find_tower_class(vision_config: dict[str, Any]) -> type[VisionTower]:
    """The kind of tower that a `mm_vision_config` describes.

    Raises:
        LlavaError: none.
    """
    kind = vision_config.get("model_type", CLIP)  # older configurations don't name it
    found = next((tower for tower in TOWERS if kind in tower.kinds or not tower.kinds), None)
    if found is None:
        raise LlavaError(f"vision towers of type {kind!r} aren't supported; {_taken()}")
    return found


def read_vision_config(folder: Path) -> dict[str, Any]:
    """What a LLaVA config keeps of a tower's own folder, as `mm_vision_config`.

    Raises:
        LlavaError: the folder holds no vision model, or one that can't be a tower.
    """
    with library_errors(f"{folder}: config.json describes no vision tower"):
        for tower in TOWERS:
            found = tower.read_config(folder)
            if found is not None:
                return found
        path = folder / "config.json"
        kind = read_json(path).get("model_type") if path.is_file() else None
    raise LlavaError(f"{folder}: not a vision tower (config.json has model_type {kind!r}); {_taken()}")


def _taken() -> str:
    kinds = [kind for tower in TOWERS for kind in tower.kinds]
    return f"use {', '.join(kinds)} or a vision model of transformers (SigLIP, DINOv2, ViT and others)"
