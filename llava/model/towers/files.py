"""Finding a vision tower's configuration and weights in its own folder or inside a LLaVA checkpoint."""

from pathlib import Path
from typing import Any

from llava.errors import LlavaError
from llava.model.towers.base import TOWER_PREFIX
from llava.model.towers.open_clip import is_open_clip_folder, open_clip_source, read_open_clip_config
from llava.model.weights.assemble import Source
from llava.model.weights.files import WeightFiles, is_harmless
from llava.records import read_json

CLIP_PREFIX = TOWER_PREFIX + "vision_tower.vision_model."

_CLIP_VISION_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
_CLIP_OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
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


def read_vision_config(folder: Path) -> dict[str, Any]:
    """The tower's configuration, from the folder of a CLIP (whole or its vision half) or of an open_clip model.

    Raises:
        LlavaError: the folder holds neither.
    """
    if is_open_clip_folder(folder):
        return read_open_clip_config(folder)
    config = read_json(folder / "config.json")
    if "vision_config" in config:
        config = {"model_type": "clip_vision_model"} | config["vision_config"]
    if config.get("model_type") != "clip_vision_model":
        raise LlavaError(f"{folder}: not a CLIP vision tower (config.json has model_type {config.get('model_type')!r})")
    from transformers import CLIPVisionConfig

    # Old files leave out what equals the defaults of their time; the whole set is kept with the checkpoint.
    full = CLIPVisionConfig.from_dict(config).to_dict()
    return {name: full[name] for name in _KEPT_FIELDS}


def known_vision_config(name: str | None) -> dict[str, Any] | None:
    """The configuration of OpenAI's CLIP towers by hub id: a checkpoint that holds the tower needs no download."""
    if name not in _OPENAI_CLIP:
        return None
    hidden, layers, heads, patch, image = _OPENAI_CLIP[name]
    from transformers import CLIPVisionConfig

    full = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=image,
    ).to_dict()
    return {field: full[field] for field in _KEPT_FIELDS}


def tower_source(folder: Path, model) -> Source:
    """The weights of a tower's own folder under the names that `model` has for them."""
    if is_open_clip_folder(folder):
        return open_clip_source(folder, model)
    weights = WeightFiles.of_folder(folder)
    names, unused_layers, unused = {}, {}, set()
    for file_name in weights:
        own_name = file_name.removeprefix("vision_model.")
        if own_name.startswith(_CLIP_VISION_PARTS):
            name = CLIP_PREFIX + own_name
            (unused_layers if in_unused_layer(name, model) else names)[name] = file_name
        elif file_name.startswith(_CLIP_OTHER_PARTS):
            unused.add(file_name)
    names = {name: file_name for name, file_name in names.items() if not is_harmless(name)}
    return Source("vision tower", weights, names, unused_layers, frozenset(unused))


def in_unused_layer(name: str, model) -> bool:
    """Whether a checkpoint's tensor belongs to the part of the tower that `model` doesn't run."""
    return name.startswith(TOWER_PREFIX) and model.get_vision_tower().is_unused_layer(name.removeprefix(TOWER_PREFIX))
