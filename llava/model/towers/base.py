"""What the model asks of a vision tower, and what all towers share: which layers run, which are left out."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava.errors import LlavaError
from llava.images import ImageProcessor
from llava.model.weights.assemble import Source
from llava.model.weights.files import WeightFiles, is_harmless

TOWER_PREFIX = "model.vision_tower."
"""What stands before the tower's names in a checkpoint."""


class VisionTower(nn.Module):
    """A vision model cut after the selected block: `forward` makes pixel values into features.

    A subclass sets the annotated attributes and says how to find its configuration and weights in a folder. Its
    state keys begin with `vision_tower.`, as LLaVA's own.

    Args:
        vision_config: what `read_config` found, or a checkpoint's `mm_vision_config`.
        select_layer: which hidden state is used (0 is the embedding, -1 the last block's output).
        select_feature: `patch` drops the tokens before the patches, `cls_patch` keeps them.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    """Values of `mm_vision_config["model_type"]` that are this tower's; () for whatever no other tower takes."""

    no_split_modules: tuple[str, ...] = ()
    """Classes whose modules stay on one device, and are sharded one by one."""

    other_parts: tuple[str, ...] = ()
    """How names in a tower's files begin that belong to something else (the text half of a CLIP)."""

    hidden_size: int
    image_size: int
    """Height and width of the pixel values, in pixels."""
    patches_per_side: int
    prefix_tokens: int
    """How many tokens come before the patches: a class token, registers, or none."""
    block_prefix: str
    """State keys of block N begin with `block_prefix` and `N.`."""
    num_blocks: int
    """Blocks of the whole vision model."""
    used_blocks: int
    """Those that are run and held."""
    tail: tuple[str, ...]
    """How the state keys begin of what comes after the last block: not run, not held."""

    tail_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """State keys and shapes of what `library_config` has after the last block."""

    def __init__(self, vision_config: dict[str, Any], select_layer: int = -2, select_feature: str = "patch"):
        super().__init__()
        if select_feature not in {"patch", "cls_patch"}:
            raise LlavaError(f"mm_vision_select_feature must be patch or cls_patch, not {select_feature!r}")
        self.vision_config = vision_config
        self.select_layer = select_layer
        self.select_feature = select_feature
        self._unused_layers: dict[str, tuple[Path, str]] = {}

    @classmethod
    @abstractmethod
    def read_config(cls, folder: Path) -> dict[str, Any] | None:
        """What a LLaVA config keeps of the tower in `folder`; None if what lies there is no tower of this kind.

        Raises:
            LlavaError: it is of this kind, and can't be used.
        """

    @classmethod
    def with_image_size(cls, vision_config: dict[str, Any], folder: Path) -> dict[str, Any]:
        """`vision_config` with the size of the images that the preprocessing in `folder` makes, if that is needed."""
        return vision_config

    @abstractmethod
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values `[n, 3, H, W]` to `[n, prefix_tokens + patches, hidden]`, the selected block's output."""

    @abstractmethod
    def own_name(self, file_name: str) -> str | None:
        """The state key of a tensor in the tower's own files; None for one that the vision model doesn't have."""

    def open_weights(self, folder: Path) -> WeightFiles:
        """The weight files of the tower's own folder."""
        return WeightFiles.of_folder(folder)

    def library_config(self) -> dict[str, Any] | None:
        """The `vision_config` with which transformers' own LLaVA builds this tower; None if it can't."""
        return None

    def default_image_settings(self) -> dict[str, Any]:
        """Preprocessing for a checkpoint without preprocessor_config.json, as `ImageProcessor` reads it."""
        normalisation = {name: self.vision_config[name] for name in ("image_mean", "image_std")
                         if name in self.vision_config}  # fmt: skip
        return {"size": self.image_size, "crop_size": self.image_size} | normalisation

    @cached_property
    def image_processor(self) -> ImageProcessor:
        """What makes pixel values for this tower; a loaded checkpoint's own takes this place."""
        return ImageProcessor.from_pretrained(self.default_image_settings())

    is_loaded = True
    """A tower has its weights from the start. LLaVA's tools ask before they call `load_model`."""

    def load_model(self, device_map: Any = None) -> None:
        """Nothing: LLaVA's tools call it for towers whose loading was put off."""

    @property
    def num_patches(self) -> int:
        """Features per image: the patches, and what comes before them where `cls_patch` is selected."""
        return self.patches_per_side**2 + self.prefix_tokens * (self.select_feature == "cls_patch")

    @property
    def dtype(self) -> torch.dtype:
        return next(one for one in self.parameters() if one.is_floating_point()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values `[n, 3, image_size, image_size]` to features `[n, num_patches, hidden_size]`.

        In the tower's dtype, on its device; without gradients while the tower is frozen.
        """
        pixel_values = pixel_values.to(self.device, self.dtype)
        size = self.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise LlavaError(
                f"the vision tower takes pixel values [n, 3, {size}, {size}], got {list(pixel_values.shape)}"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            return self.select(self.encode(pixel_values))

    def select(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[n, prefix_tokens + patches, hidden]` with the tokens before the patches, or without them."""
        return hidden_states[:, self.prefix_tokens :] if self.select_feature == "patch" else hidden_states

    def source(self, folder: Path) -> Source:
        """The weights of the tower's own folder under the names that a checkpoint has for them."""
        weights = self.open_weights(folder)
        names: dict[str, str] = {}
        unused_layers: dict[str, str] = {}
        unused = set()
        for file_name in weights:
            own_name = self.own_name(file_name)
            if own_name is not None:
                kept = unused_layers if self.is_unused_layer(own_name) else names
                kept[TOWER_PREFIX + own_name] = file_name
            elif file_name.startswith(self.other_parts):
                unused.add(file_name)
        names = {name: file_name for name, file_name in names.items() if not is_harmless(name)}
        return Source("vision tower", weights, names, unused_layers, frozenset(unused))

    def block_of(self, name: str) -> int | None:
        """The number of the block that a state key belongs to; None if it belongs to none."""
        block = name.removeprefix(self.block_prefix).partition(".")[0]
        return int(block) if name.startswith(self.block_prefix) and block.isdigit() else None

    def is_unused_layer(self, name: str) -> bool:
        """Whether a state key of the whole vision model belongs to what isn't run and therefore not held."""
        block = self.block_of(name)
        return name.startswith(self.tail) or (block is not None and self.used_blocks <= block < self.num_blocks)

    def remember_unused_layers(self, names: dict[str, str], weights: WeightFiles) -> None:
        """Note where the tensors after the selected layer lie: the model doesn't hold them, a checkpoint should.

        `names` are their names in the files of `weights`, by their names in a checkpoint.
        """
        self._unused_layers.update((name, (weights.file_of(key), key)) for name, key in names.items())

    @property
    def unused_layer_names(self) -> frozenset[str]:
        """Names in a checkpoint of the tensors after the selected layer."""
        return frozenset(self._unused_layers)

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


class NestedModel(nn.Module):
    """A vision model with `vision_model.` before its names, as older files of the library have it."""

    def __init__(self, vision_model: PreTrainedModel):
        super().__init__()
        self.vision_model = vision_model


def in_unused_layer(name: str, model: Any) -> bool:
    """Whether a checkpoint's tensor belongs to the part of the tower that `model` doesn't run."""
    return name.startswith(TOWER_PREFIX) and model.get_vision_tower().is_unused_layer(name.removeprefix(TOWER_PREFIX))


def square_side(config: PreTrainedConfig, field: str) -> int:
    """A field of a vision model's configuration that may be a number, or height and width.

    Raises:
        LlavaError: height and width differ.
    """
    value = getattr(config, field, None)
    sides = {value} if isinstance(value, int) else set(value or [])
    if len(sides) != 1:
        raise LlavaError(f"the vision model {config.model_type!r} has {field} {value}; a tower needs squares")
    return sides.pop()


def used_layers(select_layer: int, num_layers: int) -> int:
    """How many blocks must run for hidden state `select_layer` of `num_layers` blocks (state 0: none)."""
    used = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= used <= num_layers:
        raise LlavaError(
            f"mm_vision_select_layer {select_layer} doesn't exist: the vision tower has {num_layers} blocks, "
            f"so it may be {-num_layers - 1} to {num_layers}"
        )
    return used
