"""Vision towers: pixel values to patch features, running only the layers whose output is used.

`build_vision_tower` makes the tower that a LLaVA config describes, without weights of its own; the weights
come from the checkpoint or from the tower's folder (llava.model.loader).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.errors import LlavaError
from llava.model.weights.files import WeightFiles

OPEN_CLIP_KIND = "open_clip"

TOWER_PREFIX = "model.vision_tower."
"""What stands before the tower's names in a checkpoint."""


def build_vision_tower(config: Any) -> "VisionTower":
    """The tower of `config.mm_vision_config`, select layer and feature as the config says.

    Raises:
        LlavaError: the configuration is of no known tower, or the selected layer doesn't exist.
    """
    vision_config = dict(config.mm_vision_config or {})
    if vision_config.get("model_type") == OPEN_CLIP_KIND:
        from llava.model.towers.open_clip import OpenCLIPVisionTower

        tower_class: type[VisionTower] = OpenCLIPVisionTower
    else:
        tower_class = CLIPVisionTower
    return tower_class(vision_config, config.mm_vision_select_layer, config.mm_vision_select_feature)


class VisionTower(nn.Module):
    """What the model asks of a tower.

    `forward(pixel_values [n, 3, H, W]) -> [n, num_patches, hidden_size]`, in the tower's dtype.
    """

    no_split_modules: tuple[str, ...] = ()
    """Classes whose modules stay on one device, and are sharded one by one."""

    hidden_size: int
    image_size: int
    patches_per_side: int
    vision_config: dict

    def __init__(self, select_feature: str):
        super().__init__()
        if select_feature not in {"patch", "cls_patch"}:
            raise LlavaError(f"mm_vision_select_feature must be patch or cls_patch, not {select_feature!r}")
        self.select_feature = select_feature
        self._unused_layers: dict[str, tuple[Path, str]] = {}

    @property
    def num_patches(self) -> int:
        """Features per image: the patches, and the class token where `cls_patch` is selected."""
        return self.patches_per_side**2 + (self.select_feature == "cls_patch")

    @property
    def dtype(self) -> torch.dtype:
        return next(one for one in self.parameters() if one.is_floating_point()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def remember_unused_layers(self, names: dict[str, str], weights: WeightFiles) -> None:
        """Note where the tensors after the selected layer lie: the model doesn't hold them, a checkpoint should.

        `names` are their names in the files of `weights`, by their names in a checkpoint.
        """
        self._unused_layers.update((name, (weights.file_of(key), key)) for name, key in names.items())

    def unused_layer_weights(self) -> dict[str, torch.Tensor]:
        """The tensors after the selected layer, memory mapped from where the tower was loaded.

        Those whose file has gone are left out; nothing but other programs would miss them.
        """
        files = {path for path, _ in self._unused_layers.values() if path.is_file()}
        opened = {path: WeightFiles([path]) for path in files}
        return {
            name: opened[path].read(key)
            for name, (path, key) in self._unused_layers.items()
            if path in opened and key in opened[path]
        }

    def is_unused_layer(self, name: str) -> bool:
        """Whether a tensor of the whole tower, named as here, belongs to what isn't run and therefore not held."""
        raise NotImplementedError

    def select(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[n, 1 + patches, hidden]` with the class token first, or without it."""
        return hidden_states[:, 1:] if self.select_feature == "patch" else hidden_states

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(self.device, self.dtype)
        size = self.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise LlavaError(
                f"the vision tower takes pixel values [n, 3, {size}, {size}], got {list(pixel_values.shape)}"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            return self.select(self.encode(pixel_values))

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[n, 1 + patches, hidden]`, the output of the selected layer."""
        raise NotImplementedError


class CLIPVisionTower(VisionTower):
    """A CLIP ViT without the blocks after the selected layer and without the final norm.

    State keys are `vision_tower.vision_model.*`, as LLaVA writes them.
    """

    no_split_modules = ("CLIPEncoderLayer",)

    def __init__(self, vision_config: dict, select_layer: int = -2, select_feature: str = "patch"):
        super().__init__(select_feature)
        self.vision_config = vision_config
        full = CLIPVisionConfig.from_dict(vision_config)
        used = CLIPVisionConfig.from_dict(vision_config)
        used.num_hidden_layers = used_layers(select_layer, full.num_hidden_layers)
        self.hidden_size = full.hidden_size
        self.image_size = full.image_size
        self.patches_per_side = full.image_size // full.patch_size
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = CLIPVisionModel(used)
        self.vision_tower.vision_model.post_layernorm = nn.Identity()

    def is_unused_layer(self, name: str) -> bool:
        own_name = name.removeprefix("vision_tower.vision_model.")
        if own_name.startswith("post_layernorm."):
            return True
        block = own_name.removeprefix("encoder.layers.").partition(".")[0]
        used = len(self.vision_tower.vision_model.encoder.layers)
        return block.isdigit() and used <= int(block) < self.vision_config["num_hidden_layers"]

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        clip = self.vision_tower.vision_model
        hidden_states = clip.pre_layrnorm(clip.embeddings(pixel_values))
        return clip.encoder(inputs_embeds=hidden_states).last_hidden_state


def used_layers(select_layer: int, num_layers: int) -> int:
    """How many blocks must run for hidden state `select_layer` of `num_layers` blocks (state 0: none)."""
    used = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= used <= num_layers:
        raise LlavaError(
            f"mm_vision_select_layer {select_layer} doesn't exist: the vision tower has {num_layers} blocks, "
            f"so it may be {-num_layers - 1} to {num_layers}"
        )
    return used
