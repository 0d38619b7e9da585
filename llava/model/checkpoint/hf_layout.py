"""The layout of transformers' `LlavaForConditionalGeneration`: its names and configuration as LLaVA's own.

The correspondence is table 2 of the project's checkpoint notes (docs/checkpoints.md); reading accepts both what
transformers before 4.52 and what it writes since.
"""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from llava.errors import LlavaError, library_errors
from llava.images.processor import find_aspect_ratio
from llava.model.checkpoint.config import infer_template
from llava.model.configuration import LlavaConfigFields
from llava.model.families import family_of_llm
from llava.model.towers import VisionTower, find_tower_class, sketch_vision_tower
from llava.model.towers.base import TOWER_PREFIX, in_unused_layer
from llava.model.weights.assemble import Source
from llava.model.weights.files import WeightFiles
from llava.records import read_json

_RENAMED = (
    (r"(?:model\.)?language_model\.(?:model\.)?(embed_tokens|layers|norm)\.(.+)", r"model.\1.\2"),
    (r"(?:model\.)?(?:language_model\.)?lm_head\.(.+)", r"lm_head.\1"),
)
_TOWER = r"(?:model\.)?vision_tower\.(.+)"
_PROJECTORS = {"gelu": "mlp2x_gelu", "linear": "linear"}
"""LLaVA's projectors, by the activation between transformers' two layers."""
_PROJECTOR = r"(?:model\.)?multi_modal_projector\.linear_([12])\.(weight|bias)"


def is_hf_config(config: Any) -> bool:
    """Whether a config.json is transformers' own LLaVA: the fields tell, `model_type` has two meanings."""
    return isinstance(config, dict) and "text_config" in config and "vision_config" in config


def native_name(hf_name: str, linear: bool = False, tower: VisionTower | None = None) -> str | None:
    """LLaVA's name of a tensor, None for one that it has none for (the second layer of a `linear` projector).

    `tower` knows the names of its own; without it they have none.
    """
    if match := re.fullmatch(_TOWER, hf_name):
        own_name = tower.own_name(match[1]) if tower else None
        return TOWER_PREFIX + own_name if own_name else None
    for pattern, replacement in _RENAMED:
        if re.fullmatch(pattern, hf_name):
            return re.sub(pattern, replacement, hf_name)
    match = re.fullmatch(_PROJECTOR, hf_name)
    if not match:
        return None
    layer, leaf = match.groups()
    if linear:
        return f"model.mm_projector.{leaf}" if layer == "1" else None
    return f"model.mm_projector.{0 if layer == '1' else 2}.{leaf}"


def native_config(folder: Path) -> LlavaConfigFields:
    """The configuration of an HF folder as ours.

    Raises:
        LlavaError: a language model, a projector or a selection of layers that LLaVA's layout doesn't know, or fields
            that no model can have.
    """
    hf = read_json(folder / "config.json")
    with library_errors(f"{folder}: config.json describes no LLaVA of transformers"):
        return _native_config(hf, folder)


def _native_config(hf: dict[str, Any], folder: Path) -> LlavaConfigFields:
    text = dict(hf["text_config"])
    config_class = family_of_llm(text.get("model_type", "llama"), folder).config_class
    layer = hf.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise LlavaError(f"{folder}: vision_feature_layer {layer} selects several layers; only one is supported")
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        text.pop(name, None)
    if text.get("dtype") is None and text.get("torch_dtype") is None:
        text["dtype"] = hf.get("dtype") or hf.get("torch_dtype")
    activation = hf.get("projector_hidden_act", "gelu")
    if activation not in _PROJECTORS:
        raise LlavaError(
            f"{folder}: projector_hidden_act {activation!r} is neither gelu nor linear; no projector here has it"
        )
    ours = {
        "mm_projector_type": _PROJECTORS[activation],
        "mm_vision_select_layer": layer,
        "image_aspect_ratio": find_aspect_ratio(folder),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    }
    # An export of ours keeps the fields that HF has no place for.
    kept = {field.name: hf[field.name] for field in fields(LlavaConfigFields) if field.name in hf}
    config = config_class.from_dict(text | ours | kept)
    vision_config = dict(hf["vision_config"])
    config.mm_vision_config = find_tower_class(vision_config).with_image_size(vision_config, folder)
    if "mm_vision_select_feature" not in kept:
        strategy = hf.get("vision_feature_select_strategy", "default")
        config.mm_vision_select_feature = _select_feature(strategy, sketch_vision_tower(config), folder)
    if config.conversation_template is None:
        infer_template(config, folder)
    return config


def _select_feature(strategy: str, tower: VisionTower, folder: Path) -> str:
    """`default` drops the first token whatever it is, `full` keeps all."""
    if strategy == "full":
        return "cls_patch" if tower.prefix_tokens else "patch"
    if tower.prefix_tokens != 1:
        raise LlavaError(
            f"{folder}: vision_feature_select_strategy {strategy!r} drops one token of each image, but the vision "
            f"tower has {tower.prefix_tokens} before its patches; only full can be read"
        )
    return "patch"


def hf_source(weights: WeightFiles, model) -> Source:
    """The weights of an HF folder under the names that `model` has for them.

    Raises:
        LlavaError: a projector without activation whose second layer isn't the identity.
    """
    linear = model.config.mm_projector_type == "linear"
    tower = model.get_vision_tower()
    names, unused_layers, unused = {}, {}, set()
    for hf_name in weights:
        name = native_name(hf_name, linear, tower)
        if name is None:
            if linear and re.fullmatch(_PROJECTOR, hf_name):
                check_identity(weights, hf_name)
                unused.add(hf_name)
        elif in_unused_layer(name, model):
            unused_layers[name] = hf_name
        else:
            names[name] = hf_name
    return Source("checkpoint", weights, names, unused_layers, frozenset(unused))


def check_identity(weights: WeightFiles, hf_name: str) -> None:
    """Fail unless a tensor of the second layer of a projector without activation does nothing."""
    tensor = weights.read(hf_name)
    expected = torch.eye(len(tensor)) if tensor.ndim == 2 else torch.zeros(len(tensor))
    if tensor.shape != expected.shape or not torch.equal(tensor.float(), expected):
        raise LlavaError(
            f"{weights.file_of(hf_name)}: {hf_name} isn't the identity, but projector_hidden_act is linear; "
            f"two linear layers in a row have no counterpart in LLaVA's layout"
        )
