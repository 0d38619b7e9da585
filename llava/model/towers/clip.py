"""CLIP's vision tower (LLaVA-Med, LLaVA, BabyDoctor): a ViT with a class token."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.towers.base import TOWER_PREFIX, NestedModel, VisionTower, square_side, used_layers
from llava.records import read_json

KIND = "clip_vision_model"
_PREFIX = "vision_tower.vision_model."
CLIP_PREFIX = TOWER_PREFIX + _PREFIX
"""What stands before CLIP's own names in a checkpoint."""

_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
_OPENAI_CLIP = {
    "openai/clip-vit-large-patch14-336": (1024, 24, 16, 14, 336),
    "openai/clip-vit-large-patch14": (1024, 24, 16, 14, 224),
    "openai/clip-vit-base-patch16": (768, 12, 12, 16, 224),
    "openai/clip-vit-base-patch32": (768, 12, 12, 32, 224),
}
_KEPT_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "projection_dim",
)


class CLIPVisionTower(VisionTower):
    """A CLIP ViT without the blocks after the selected layer and without the final norm.

    State keys are `vision_tower.vision_model.*`, as LLaVA writes them.
    """

    kinds = (KIND,)
    no_split_modules = ("CLIPEncoderLayer",)
    other_parts = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    block_prefix = _PREFIX + "encoder.layers."
    tail = (_PREFIX + "post_layernorm.",)
    prefix_tokens = 1

    def __init__(self, vision_config: dict[str, Any], select_layer: int = -2, select_feature: str = "patch"):
        super().__init__(vision_config, select_layer, select_feature)
        full = CLIPVisionConfig.from_dict(vision_config)
        used = CLIPVisionConfig.from_dict(vision_config)
        self.num_blocks = full.num_hidden_layers
        self.used_blocks = used.num_hidden_layers = used_layers(select_layer, self.num_blocks)
        self.hidden_size = full.hidden_size
        self.image_size = square_side(full, "image_size")
        self.patches_per_side = self.image_size // square_side(full, "patch_size")
        self.tail_shapes = {f"{_PREFIX}post_layernorm.{leaf}": (self.hidden_size,) for leaf in ("weight", "bias")}
        model = CLIPVisionModel(used)
        model.set_submodule("post_layernorm", nn.Identity())
        self.vision_tower = NestedModel(model)

    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any] | None:
        """From the folder of a whole CLIP, or of its vision half."""
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        if config.get("model_type") == "clip":
            config = {"model_type": KIND} | config["vision_config"]
        if config.get("model_type") not in (KIND, "clip_vision"):
            return None
        return _complete(CLIPVisionConfig.from_dict(config))

    def own_name(self, file_name: str) -> str | None:
        name = file_name.removeprefix("vision_model.")
        return _PREFIX + name if name.startswith(_PARTS) else None

    def library_config(self) -> dict[str, Any]:
        return {"model_type": KIND} | self.vision_config

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        clip = cast(CLIPVisionModel, self.vision_tower.vision_model)
        hidden_states = clip.pre_layrnorm(clip.embeddings(pixel_values))
        return clip.encoder(inputs_embeds=hidden_states).last_hidden_state


def known_vision_config(name: str | None) -> dict[str, Any] | None:
    """The configuration of OpenAI's CLIP towers by hub id: a checkpoint that holds the tower needs no download."""
    if name not in _OPENAI_CLIP:
        return None
    hidden, layers, heads, patch, image = _OPENAI_CLIP[name]
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=image,
    )
    return _complete(config)


def _complete(config: CLIPVisionConfig) -> dict[str, Any]:
    """Old files leave out what equals the defaults of their time; the whole set is kept with the checkpoint."""
    full = config.to_dict()
    return {name: full[name] for name in _KEPT_FIELDS}
