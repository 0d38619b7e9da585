"""Any vision model of the library as a tower: SigLIP, DINOv2, ViT, with or without class token and registers.

What a model is like is found by running it once without memory: which modules come after the blocks (final norm,
pooling head: never computed here), and how many tokens stand before the patches.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from llava.errors import LlavaError, first_line
from llava.images import ImageProcessor
from llava.images.processor import FILE_NAME as PREPROCESSING
from llava.model.towers.base import NestedModel, VisionTower, square_side, used_layers
from llava.records import read_json

INPUT_SIZE = "input_size"
"""Field of `mm_vision_config`: the images' size where it isn't the one that the model was configured for."""

_STATE = "vision_tower."
_NESTED = "vision_model"
"""Models whose files have this before their names keep it in a checkpoint, as LLaVA's do."""


class HuggingFaceVisionTower(VisionTower):
    """The library's model of `mm_vision_config["model_type"]`, cut after the selected block.

    State keys are `vision_tower.` and the model's own names, with `vision_model.` between where the library's files
    have that too.

    Raises:
        LlavaError: the library has no such model, it isn't a row of blocks over a square of patches, or the selected
            layer doesn't exist.
    """

    other_parts = ("text_model.", "text_projection.", "visual_projection.", "logit_", "classifier.")

    def __init__(self, vision_config: dict[str, Any], select_layer: int = -2, select_feature: str = "patch"):
        super().__init__(vision_config, select_layer, select_feature)
        config = _library_config(vision_config)
        self.num_blocks = config.num_hidden_layers
        self.used_blocks = used_layers(select_layer, self.num_blocks)
        if self.used_blocks == 0:
            raise LlavaError(f"mm_vision_select_layer {select_layer}: {config.model_type} needs at least one block")
        self.image_size = vision_config.get(INPUT_SIZE) or square_side(config, "image_size")
        self.patches_per_side = self.image_size // square_side(config, "patch_size")
        with torch.device("meta"):
            full = _model_class(type(config))(config)
        blocks = _name_of_blocks(full, self.num_blocks)
        after, tokens, self.hidden_size = _try_out(full, blocks, self.image_size)
        self.prefix_tokens = tokens - self.patches_per_side**2
        if self.prefix_tokens < 0:
            raise LlavaError(
                f"the vision model {config.model_type} makes {tokens} features of an image, fewer than its "
                f"{self.patches_per_side} x {self.patches_per_side} patches; it can't be a tower"
            )
        self.weight_prefix = _STATE + (f"{_NESTED}." if full.base_model_prefix == _NESTED else "")
        self.block_prefix = f"{self.weight_prefix}{blocks}."
        self.no_split_modules = (type(_blocks(full, blocks)[0]).__name__,)
        self.tail = tuple(f"{self.weight_prefix}{name}." for name in after)
        shapes = {self.weight_prefix + name: tuple(tensor.shape) for name, tensor in full.state_dict().items()}
        self.known_names = frozenset(shapes)
        self.tail_shapes = {name: shape for name, shape in shapes.items() if name.startswith(self.tail)}
        model = _model_class(type(config))(_library_config(vision_config, num_hidden_layers=self.used_blocks))
        for name in after:
            model.set_submodule(name, nn.Identity())
        self.vision_tower = model if self.weight_prefix == _STATE else NestedModel(model)

    @property
    def library_model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.get_submodule(self.weight_prefix.removesuffix(".")))

    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any] | None:
        """From the folder of a vision model, or of a pair of text and vision model."""
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        if isinstance(config.get("vision_config"), dict):
            kind = f"{config.get('model_type')}_vision_model"
            config = {"model_type": kind} | config["vision_config"]
        if not _is_vision_model(config.get("model_type")):
            return None
        # Old files leave out what equals the defaults of their time; the whole set is kept with the checkpoint.
        full = _library_config(config).to_dict()
        everywhere = PreTrainedConfig().to_dict()
        kept = {name: value for name, value in full.items() if name not in everywhere or name == "model_type"}
        return cls.with_image_size(kept, folder)

    @classmethod
    def with_image_size(cls, vision_config: dict[str, Any], folder: Path) -> dict[str, Any]:
        """DINOv2 was configured for 518 px and is used with 224: its position embeddings are interpolated."""
        processor = ImageProcessor.find(folder)
        if processor is None:
            return vision_config
        height, width = processor.crop_size
        if height != width or height == vision_config.get("image_size"):
            return vision_config
        return vision_config | {INPUT_SIZE: height}

    def library_config(self) -> dict[str, Any]:
        return {name: value for name, value in self.vision_config.items() if name != INPUT_SIZE}

    def default_image_settings(self) -> dict[str, Any]:
        raise LlavaError(
            f"the vision tower {self.vision_config['model_type']!r} needs its {PREPROCESSING}, and there is none in "
            f"the checkpoint's folder or the tower's; copy it from the tower's source"
        )

    def own_name(self, file_name: str) -> str | None:
        """By the library's list of names that have changed, and without the prefix of a part of a larger model."""
        name = file_name
        for change in self._changes:
            joined = hasattr(change, "operations")
            name, matched = change.rename_source_key(name)
            if joined and matched:
                raise LlavaError(
                    f"{file_name}: the vision tower's file holds this weight joined from two; write the tower anew "
                    f"with transformers: model.save_pretrained(FOLDER, save_original_format=False)"
                )
        prefix = self.library_model.base_model_prefix + "."
        candidates = (name, name.removeprefix(prefix), file_name, file_name.removeprefix(prefix))
        return next((key for key in (self.weight_prefix + one for one in candidates) if key in self.known_names), None)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # The modules after the last block are identities: what comes out is the block's output.
        return self.library_model(pixel_values).last_hidden_state

    @cached_property
    def _changes(self) -> list[Any]:
        """The library's changes of this model's weights: older files have other names."""
        model = self.library_model
        found = get_checkpoint_conversion_mapping(type(model).__name__)
        if found is None:
            found = get_checkpoint_conversion_mapping(model.config.model_type)
        return found or []


def _is_vision_model(kind: str | None) -> bool:
    if kind is None or kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        return False
    return _model_class(CONFIG_MAPPING[kind]).main_input_name == "pixel_values"


def _model_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    return cast(type[PreTrainedModel], MODEL_MAPPING[config_class])


def _library_config(vision_config: dict[str, Any], **changes: Any) -> PreTrainedConfig:
    kind = vision_config.get("model_type")
    if kind is None or not _is_vision_model(kind):
        raise LlavaError(f"vision towers of type {kind!r} aren't supported: the library has no such vision model")
    fields = {name: value for name, value in vision_config.items() if name not in ("model_type", INPUT_SIZE)}
    if changes:
        # Names of stages are made from the number of blocks.
        fields = {name: value for name, value in fields.items() if not name.startswith(("stage_names", "out_"))}
    config = CONFIG_MAPPING[kind].from_dict(fields | changes)
    if not all(isinstance(getattr(config, name, None), int) for name in ("num_hidden_layers", "hidden_size")):
        raise LlavaError(f"the vision model {kind!r} isn't a row of blocks of one width; it can't be a tower")
    return config


def _name_of_blocks(model: nn.Module, count: int) -> str:
    """The name of the list that holds the model's blocks: of its lists of that length, the one with most weights."""
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not lists:
        raise LlavaError(f"{type(model).__name__} has no list of {count} blocks; it can't be a tower")
    return max(lists, key=lambda name: lists[name])


def _blocks(model: nn.Module, name: str) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(name))


def _try_out(model: nn.Module, blocks: str, image_size: int) -> tuple[list[str], int, int]:
    """Run a model on the meta device: the modules that begin after the last block, tokens per image, their width."""
    names = {module: name for name, module in model.named_modules()}
    after: list[str] = []
    finished = False

    def begin(module: nn.Module, *_: Any) -> None:
        if finished and not names[module].startswith(tuple(f"{name}." for name in after)):
            after.append(names[module])

    def finish(*_: Any) -> None:
        nonlocal finished
        finished = True

    hooks = [module.register_forward_pre_hook(begin) for module in names]
    hooks.append(_blocks(model, blocks)[-1].register_forward_hook(finish))
    try:
        with torch.no_grad():
            shape = model(torch.zeros(1, 3, image_size, image_size, device="meta")).last_hidden_state.shape
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise LlavaError(
            f"{type(model).__name__} doesn't run on images of {image_size} x {image_size} pixels "
            f"({first_line(error)}); it can't be a tower"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if len(shape) != 3:
        raise LlavaError(f"{type(model).__name__} doesn't give a feature for each patch; it can't be a tower")
    return after, shape[1], shape[2]
