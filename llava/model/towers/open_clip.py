"""The vision tower of an open_clip model with a timm ViT (BiomedCLIP): patches of its trunk, no block too many.

Needs the extra `openclip`; nothing else of the package imports it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.errors import LlavaError, require
from llava.model.towers.base import OPEN_CLIP_KIND, TOWER_PREFIX, VisionTower, used_layers
from llava.model.weights.assemble import Source
from llava.model.weights.files import WeightFiles
from llava.records import read_json

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

_TRUNK = "visual.trunk."
_OTHER_PARTS = ("text.", "visual.head.", "logit_scale", "logit_bias")
_NOT_RUN = ("norm.", "fc_norm.", "head.", "attn_pool.")


class OpenCLIPVisionTower(VisionTower):
    """The trunk of open_clip's `TimmModel`, cut after the selected block.

    State keys are `vision_tower.trunk.*`, named as in open_clip's own files.

    Raises:
        LlavaError: open_clip isn't installed, the trunk is no ViT, or the selected layer doesn't exist.
    """

    no_split_modules = ("Block",)

    def __init__(self, vision_config: dict, select_layer: int = -2, select_feature: str = "patch"):
        super().__init__(select_feature)
        self.vision_config = vision_config
        trunk = _build_trunk(vision_config)
        self.num_blocks = len(trunk.blocks)
        trunk.blocks = trunk.blocks[: used_layers(select_layer, self.num_blocks)]
        trunk.norm = nn.Identity()
        for name in ("fc_norm", "head_drop", "head"):
            setattr(trunk, name, nn.Identity())
        self.hidden_size = trunk.embed_dim
        self.image_size = trunk.patch_embed.img_size[0]
        self.patches_per_side = trunk.patch_embed.grid_size[0]
        self.vision_tower = nn.Module()
        self.vision_tower.trunk = trunk

    def is_unused_layer(self, name: str) -> bool:
        own_name = name.removeprefix("vision_tower.trunk.")
        if own_name.startswith(_NOT_RUN):
            return True
        block = own_name.removeprefix("blocks.").partition(".")[0]
        return block.isdigit() and len(self.vision_tower.trunk.blocks) <= int(block) < self.num_blocks

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vision_tower.trunk.forward_features(pixel_values)


def is_open_clip_folder(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def read_open_clip_config(folder: Path) -> dict[str, Any]:
    """What a LLaVA config keeps of `open_clip_config.json`: the trunk's name, and how images are normalised.

    Raises:
        LlavaError: the vision half isn't a timm model.
    """
    path = folder / CONFIG_FILE
    content = read_json(path)
    vision = content.get("model_cfg", content).get("vision_cfg", {})
    if not vision.get("timm_model_name"):
        raise LlavaError(
            f"{path}: only open_clip models with a timm ViT (like BiomedCLIP's) can be towers, this one has none; "
            f"use the model's CLIP form for transformers"
        )
    preprocessing = content.get("preprocess_cfg", {})
    return {
        "model_type": OPEN_CLIP_KIND,
        "timm_model_name": vision["timm_model_name"],
        "image_size": vision.get("image_size", 224),
    } | {f"image_{name}": list(preprocessing[name]) for name in ("mean", "std") if name in preprocessing}


def open_clip_source(folder: Path, model) -> Source:
    """The trunk's weights of an open_clip folder under the names that `model` has for them."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise LlavaError(f"{folder}: no open_clip weights found (looked for {', '.join(WEIGHT_FILES)})")
    weights = WeightFiles([path])
    tower = model.get_vision_tower()
    names, unused_layers, unused = {}, {}, set()
    for file_name in weights:
        if file_name.startswith(_TRUNK):
            own_name = "vision_tower.trunk." + file_name.removeprefix(_TRUNK)
            (unused_layers if tower.is_unused_layer(own_name) else names)[TOWER_PREFIX + own_name] = file_name
        elif file_name.startswith(_OTHER_PARTS):
            unused.add(file_name)
    return Source("vision tower", weights, names, unused_layers, frozenset(unused))


def _build_trunk(vision_config: dict) -> nn.Module:
    timm_model = require("open_clip.timm_model", "openclip")
    name = vision_config["timm_model_name"]
    try:
        trunk = timm_model.TimmModel(name, embed_dim=1, image_size=vision_config["image_size"], pool="").trunk
    except (RuntimeError, AttributeError) as error:
        raise LlavaError(f"open_clip can't build the vision tower {name!r} ({error})") from error
    if not all(hasattr(trunk, part) for part in ("blocks", "patch_embed", "embed_dim", "num_prefix_tokens")):
        raise LlavaError(f"the vision tower {name!r} is no ViT; only ViTs give features of patches")
    if trunk.num_prefix_tokens != 1:
        raise LlavaError(f"the vision tower {name!r} has {trunk.num_prefix_tokens} tokens before its patches, not 1")
    return trunk
