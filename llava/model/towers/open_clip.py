"""The vision tower of an open_clip model with a timm ViT (BiomedCLIP): patches of its trunk, used blocks only.

Building one needs the extra `openclip`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava.errors import LlavaError, require
from llava.model.towers.base import VisionTower, used_layers
from llava.model.weights.files import WeightFiles
from llava.records import read_json

KIND = "open_clip"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

if TYPE_CHECKING:

    class _PatchEmbedding(nn.Module):
        img_size: tuple[int, int]
        grid_size: tuple[int, int]

    class _Trunk(nn.Module):
        """What is used here of timm's VisionTransformer."""

        blocks: nn.Sequential
        patch_embed: _PatchEmbedding
        embed_dim: int
        num_prefix_tokens: int

        def forward_features(self, x: torch.Tensor) -> torch.Tensor: ...


_TRUNK = "visual.trunk."
_PREFIX = "vision_tower.trunk."


class OpenCLIPVisionTower(VisionTower):
    """The trunk of open_clip's `TimmModel`, cut after the selected block.

    State keys are `vision_tower.trunk.*`, named as in open_clip's own files.

    Raises:
        LlavaError: open_clip isn't installed, the trunk is no ViT, or the selected layer doesn't exist.
    """

    kinds = (KIND,)
    no_split_modules = ("Block",)
    other_parts = ("text.", "visual.head.", "logit_scale", "logit_bias")
    block_prefix = _PREFIX + "blocks."
    tail = tuple(_PREFIX + name for name in ("norm.", "fc_norm.", "head.", "attn_pool."))

    def __init__(self, vision_config: dict[str, Any], select_layer: int = -2, select_feature: str = "patch"):
        super().__init__(vision_config, select_layer, select_feature)
        trunk = _build_trunk(vision_config)
        self.num_blocks = len(trunk.blocks)
        self.used_blocks = used_layers(select_layer, self.num_blocks)
        trunk.blocks = nn.Sequential(*list(trunk.blocks)[: self.used_blocks])
        for name in ("norm", "fc_norm", "head_drop", "head"):
            setattr(trunk, name, nn.Identity())
        self.hidden_size = trunk.embed_dim
        self.image_size = trunk.patch_embed.img_size[0]
        self.patches_per_side = trunk.patch_embed.grid_size[0]
        self.prefix_tokens = trunk.num_prefix_tokens
        self.vision_tower = _Visual(trunk)

    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any] | None:
        """The trunk's name, and how images are normalised, from `open_clip_config.json`.

        Raises:
            LlavaError: the vision half isn't a timm model.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            return None
        content = read_json(path)
        vision = content.get("model_cfg", content).get("vision_cfg", {})
        if not vision.get("timm_model_name"):
            raise LlavaError(
                f"{path}: only open_clip models with a timm ViT (like BiomedCLIP's) can be towers, this one has none; "
                f"use the model's CLIP form for transformers"
            )
        preprocessing = content.get("preprocess_cfg", {})
        return {
            "model_type": KIND,
            "timm_model_name": vision["timm_model_name"],
            "image_size": vision.get("image_size", 224),
        } | {f"image_{name}": list(preprocessing[name]) for name in ("mean", "std") if name in preprocessing}

    def open_weights(self, folder: Path) -> WeightFiles:
        path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
        if path is None:
            raise LlavaError(f"{folder}: no open_clip weights found (looked for {', '.join(WEIGHT_FILES)})")
        return WeightFiles([path])

    def own_name(self, file_name: str) -> str | None:
        return _PREFIX + file_name.removeprefix(_TRUNK) if file_name.startswith(_TRUNK) else None

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vision_tower.trunk.forward_features(pixel_values)


class _Visual(nn.Module):
    """open_clip's own nesting, for the names of the weights."""

    def __init__(self, trunk: "_Trunk"):
        super().__init__()
        self.trunk = trunk


def _build_trunk(vision_config: dict[str, Any]) -> "_Trunk":
    timm_model = require("open_clip.timm_model", "openclip")
    name = vision_config["timm_model_name"]
    try:
        trunk = timm_model.TimmModel(name, embed_dim=1, image_size=vision_config["image_size"], pool="").trunk
    except (RuntimeError, AttributeError) as error:
        raise LlavaError(f"open_clip can't build the vision tower {name!r} ({error})") from error
    if not all(hasattr(trunk, part) for part in ("blocks", "patch_embed", "embed_dim", "num_prefix_tokens")):
        raise LlavaError(f"the vision tower {name!r} is no ViT; only ViTs give features of patches")
    return trunk
