"""The layouts that checkpoints come in: which one a folder holds, and where each of the model's weights lies.

Decided from what the files hold, never from a folder's name. Each `_open_*` function answers for one layout
with `Parts`: the configuration and the sources that fill a model built from it.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava.errors import LlavaError, library_errors
from llava.folders import expanded
from llava.model.checkpoint.adapter import ADAPTER_CONFIG, LoraAdapter, native_name, non_lora_file
from llava.model.checkpoint.config import read_config
from llava.model.checkpoint.hf_layout import hf_source, is_hf_config, native_config
from llava.model.checkpoint.hf_layout import native_name as native_name_of_hf
from llava.model.configuration import LlavaConfigFields
from llava.model.families import EMBEDDINGS, FINAL_NORM
from llava.model.language_model import LlavaForCausalLM
from llava.model.towers import read_vision_config
from llava.model.towers.base import TOWER_PREFIX, in_unused_layer
from llava.model.towers.clip import known_vision_config
from llava.model.weights.assemble import Source, tied_weights
from llava.model.weights.files import WeightFiles, find_weight_files, is_harmless
from llava.model.weights.locate import find_model, locate_model
from llava.records import read_json

log = logging.getLogger(__name__)

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")

_DELTA_NORM = 0.1
"""A final norm's weights lie around one or above; the difference of two of them is far below this."""


@dataclass
class Parts:
    """What a checkpoint consists of: `sources(model)` fills a model of `config`; later ones take precedence.

    `folders` are where tokenizer and image processor are looked for, in this order. `weights` are the
    language model's, `quantized` what of them is stored in 8 or 4 bits.
    """

    config: LlavaConfigFields
    weights: WeightFiles
    sources: Callable[[LlavaForCausalLM], list[Source]]
    folders: list[Path]
    tower_folder: Path | None = None
    quantized: bool = field(init=False)

    def __post_init__(self):
        self.quantized = is_quantized(self.weights)


def open_checkpoint(
    folder: Path,
    base_folder: Path | None = None,
    vision_tower: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Parts:
    """The parts of the checkpoint in `folder`, over `base_folder` where it isn't a whole model.

    A tower that is a hub id is downloaded into `cache_dir`, by default the hub's cache.

    Raises:
        LlavaError: an adapter or projector without its base, a delta, a folder without weights; the message
            has the command that helps.
    """
    with library_errors(f"{folder}: no checkpoint that can be opened; a file of settings in it is wrong"):
        find_tower = partial(_find_tower, override=vision_tower, cache_dir=cache_dir)
        parts = _open(folder, base_folder, find_tower, cache_dir)
    if vision_tower is not None and parts.tower_folder is None:
        own = parts.config.mm_vision_tower
        if own is None or expanded(vision_tower).resolve() != expanded(own).resolve():
            log.warning("vision tower %s: not used; %s holds its own, trained with it (%s)", vision_tower, folder, own)
    return parts


def _open(
    folder: Path, base_folder: Path | None, find_tower: Callable[..., Path | None], cache_dir: str | Path | None
) -> Parts:
    if (folder / ADAPTER_CONFIG).is_file():
        return _open_adapter(folder, base_folder, find_tower, cache_dir)
    if not find_weight_files(folder):
        return _open_projector(folder, base_folder, find_tower)
    if base_folder is not None:
        log.warning("%s is a whole model; the base %s is not used", folder, base_folder)
    if is_hf_config(read_json(folder / "config.json")):
        return _open_hf(folder)
    return _open_native(folder, find_tower)


def is_delta(weights: WeightFiles) -> bool:
    """Whether these are differences to a base: the final norm is near zero, stored rotary tables are zero."""
    tables = [name for name in weights if name.endswith("rotary_emb.inv_freq")]
    if tables and not weights.read(tables[0]).any():
        return True
    return FINAL_NORM in weights and weights.read(FINAL_NORM).float().abs().mean().item() < _DELTA_NORM


def is_quantized(weights: WeightFiles) -> bool:
    """Whether weights are stored in 8 or 4 bits: bitsandbytes' quantization state is stored with them."""
    return any(name.endswith((".SCB", ".absmax")) for name in weights)


def model_weights(folder: Path) -> WeightFiles:
    """The weights of a model's folder.

    Raises:
        LlavaError: there are none, or they are differences to a base; the message has the command that adds them.
    """
    weights = WeightFiles.of_folder(folder)
    if is_delta(weights):
        raise LlavaError(
            f"{folder} holds delta weights, not a model; add them to their base first: llava-med "
            f"apply-delta --base BASE_MODEL --delta {folder} --target OUTPUT_FOLDER"
        )
    return weights


def projector_file(folder: Path) -> Path | None:
    """The file of a trained projector in a folder."""
    return next((folder / name for name in PROJECTOR_FILES if (folder / name).is_file()), None)


def native_source(weights: WeightFiles, model: LlavaForCausalLM, what: str = "checkpoint") -> Source:
    """The weights of a native folder; prefixes that peft or LLaVA's LoRA training left are dropped.

    The tower may have names that the library's vision models had in other versions.
    """
    tower = model.get_vision_tower()
    names, unused_layers = {}, {}
    for file_name in weights:
        name = native_name(file_name)
        if name.startswith(TOWER_PREFIX):
            own_name = tower.own_name(name.removeprefix(f"{TOWER_PREFIX}vision_tower."))
            name = TOWER_PREFIX + own_name if own_name else name
        if in_unused_layer(name, model):
            unused_layers[name] = file_name
        elif not is_harmless(name):
            names[name] = file_name
    return Source(what, weights, names, unused_layers)


def _open_native(folder: Path, find_tower: Callable[..., Path | None]) -> Parts:
    config = read_config(folder)
    weights = model_weights(folder)
    if not config.mm_vision_tower and not config.mm_vision_config:
        raise LlavaError(
            f"{folder}: a language model without a vision tower (config.json has no mm_vision_tower); give the "
            f"LLaVA folder as model_path, and this one as model_base if that needs it"
        )
    tower_folder = find_tower(config, folder, weights)

    def sources(model: LlavaForCausalLM) -> list[Source]:
        tower = _tower_sources(model, tower_folder, weights)
        return [*tower, native_source(weights, model)]

    return Parts(config, weights, sources, [folder], tower_folder)


def _open_hf(folder: Path) -> Parts:
    weights = WeightFiles.of_folder(folder)
    if is_quantized(weights):
        raise LlavaError(
            f"{folder}: weights that are stored in 8 or 4 bits aren't loaded from transformers' layout; bring them "
            f"into LLaVA's first: llava-med import --model-path {folder} --output OUTPUT_FOLDER"
        )
    return Parts(native_config(folder), weights, lambda model: [hf_source(weights, model)], [folder])


def _open_adapter(
    folder: Path, base_folder: Path | None, find_tower: Callable[..., Path | None], cache_dir: str | Path | None
) -> Parts:
    adapter = LoraAdapter(folder)
    if base_folder is None and adapter.base_name:
        base_folder = find_model(adapter.base_name, folder, cache_dir)
        if base_folder is not None:
            log.info("%s: over its recorded base %s; --model-base names another", folder, base_folder)
    if base_folder is None:
        base = adapter.base_name or "BASE_MODEL"
        raise LlavaError(
            f"{folder} is a LoRA adapter, not a whole model; add --model-base {base}, or merge it once: llava-med "
            f"merge-lora --model-path {folder} --model-base {base} --save-model-path OUTPUT_FOLDER"
        )
    is_hf = is_hf_config(read_json(base_folder / "config.json"))
    if (folder / "config.json").is_file():
        config = read_config(folder)
    else:
        config = native_config(base_folder) if is_hf else read_config(base_folder)
    _grow_vocabulary(config, adapter)
    weights = model_weights(base_folder)
    if is_quantized(weights):
        raise LlavaError(
            f"{base_folder}: an adapter can't be added to weights that are stored in 8 or 4 bits; give the base in "
            f"full precision, and load_8bit or load_4bit to quantize the sum"
        )
    extra_path = non_lora_file(folder)
    extra = WeightFiles([extra_path] if extra_path else [])
    tower_folder = None if is_hf else find_tower(config, folder, weights, extra)

    def sources(model: LlavaForCausalLM) -> list[Source]:
        if is_hf:
            linear, tower = config.mm_projector_type == "linear", model.get_vision_tower()
            adapter.rename(lambda name: native_name_of_hf(name, linear, tower))
        changed = [hf_source(weights, model) if is_hf else native_source(weights, model, "base model")]
        changed.append(native_source(extra, model, "adapter's other weights"))
        changed[:0] = _tower_sources(model, tower_folder, weights, extra)
        for source in changed:
            source.convert = adapter.merged
        _check_reach(adapter, changed, base_folder, model)
        replaced = Source("adapter", adapter.weights, adapter.overrides, unused=_pair_names(adapter))
        return [*changed, replaced]

    return Parts(config, weights, sources, [folder, base_folder], tower_folder)


def _grow_vocabulary(config: LlavaConfigFields, adapter: LoraAdapter) -> None:
    """An adapter that brings a whole embedding or head of more rows was trained with more tokens than its base."""
    for name, file_name in adapter.overrides.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            config.vocab_size = max(config.vocab_size, adapter.weights.shape(file_name)[0])


def _open_projector(folder: Path, base_folder: Path | None, find_tower: Callable[..., Path | None]) -> Parts:
    path = projector_file(folder)
    if path is None:
        raise LlavaError(
            f"{folder}: no weights found (looked for model.safetensors and pytorch_model.bin with or without "
            f"index, {ADAPTER_CONFIG}, {' and '.join(PROJECTOR_FILES)})"
        )
    if base_folder is None:
        raise LlavaError(
            f"{folder} holds a projector only ({path.name}), not a whole model; add --model-base LANGUAGE_MODEL, "
            f"the model that it was trained with"
        )
    config = read_config(folder)
    weights = model_weights(base_folder)
    projector = WeightFiles([path])
    tower_folder = find_tower(config, folder, weights)

    def sources(model: LlavaForCausalLM) -> list[Source]:
        tower = _tower_sources(model, tower_folder, weights)
        base = native_source(weights, model, "base model")
        own = projector_source(projector, model)
        _grow_embeddings(base, own, model)
        return [*tower, base, own]

    return Parts(config, weights, sources, [folder, base_folder], tower_folder)


def projector_source(weights: WeightFiles, model: LlavaForCausalLM) -> Source:
    """A projector file's tensors: `…mm_projector.*` under any prefix, and trained rows of the embedding."""
    names = {}
    for file_name in weights:
        match = re.fullmatch(r"(?:.*\.)?(mm_projector\.|embed_tokens\.)(.+)", file_name)
        name = f"model.{match[1]}{match[2]}" if match else file_name
        names[name] = file_name
    return Source("projector", weights, names)


def _grow_embeddings(base: Source, own: Source, model: LlavaForCausalLM) -> None:
    """New image tokens over a plain language model: trained rows from the projector file, else the mean.

    LLaVA's stage 1 saves the embedding's new rows and leaves those of the head as it made them: the mean.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    for name in EMBEDDINGS:
        if name not in base.names:
            continue
        shape = base.weights.shape(base.names[name])
        trained = own.names.get(name)
        if trained and own.weights.shape(trained)[0] == rows:
            continue
        if shape[0] >= rows:
            continue
        new = None
        if trained:
            new = own.weights.read(trained)
            if new.shape[0] != rows - shape[0]:
                continue  # reported as a shape that doesn't fit
            del own.names[name]
            own.unused |= {trained}
        else:
            log.warning(
                "%s: %d new rows of %s start as the mean of the others",
                base.weights.file_of(base.names[name]),
                rows - shape[0],
                name,
            )
        base.shapes[name] = (rows, *shape[1:])
        base.convert = _appending(base.convert, name, new, rows)


def _appending(before, name: str, new: torch.Tensor | None, rows: int):
    def convert(this: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor if before is None else before(this, tensor)
        if this != name:
            return tensor
        added = new
        if added is None:
            added = tensor.float().mean(dim=0, keepdim=True).expand(rows - tensor.shape[0], -1)
        return torch.cat([tensor, added.to(tensor.dtype)])

    return convert


def _check_reach(adapter: LoraAdapter, sources: list[Source], base_folder: Path, model: LlavaForCausalLM) -> None:
    for name in adapter.adds_to & tied_weights(model).keys():
        raise LlavaError(
            f"{adapter.weights.files[0]}: the adapter changes {name}, which is the embedding of {base_folder} "
            f"(config.json: tie_word_embeddings); train one without that layer"
        )
    lost = sorted(adapter.adds_to.difference(*(source.names for source in sources)))
    unused = [name for name in lost if in_unused_layer(name, model)]
    if unused:
        log.warning("%s: %d updates of layers that the tower doesn't use are left out", adapter.folder, len(unused))
    lost = [name for name in lost if name not in unused]
    if lost:
        raise LlavaError(
            f"{adapter.weights.files[0]}: the adapter changes {lost[0]} (one of {len(lost)}), which the base "
            f"{base_folder} doesn't have; it was trained on {adapter.base_name}"
        )


def _pair_names(adapter: LoraAdapter) -> frozenset[str]:
    return frozenset(set(adapter.weights) - set(adapter.overrides.values()))


def _tower_sources(model: LlavaForCausalLM, tower_folder: Path | None, *holders: WeightFiles) -> list[Source]:
    """The tower's own files, where none of the others holds the tower."""
    if tower_folder is None or any(_has_tower(weights) for weights in holders):
        return []
    return [model.get_vision_tower().source(tower_folder)]


def _has_tower(weights: WeightFiles) -> bool:
    return any(native_name(name).startswith(TOWER_PREFIX) for name in weights)


def _find_tower(
    config: Any, folder: Path, *holders: WeightFiles, override: str | Path | None, cache_dir: str | Path | None
) -> Path | None:
    """The tower's own folder, None if it isn't needed; fills `config.mm_vision_config` from it."""
    inside = any(_has_tower(weights) for weights in holders)
    if inside:
        config.mm_vision_config = config.mm_vision_config or known_vision_config(config.mm_vision_tower)
        if config.mm_vision_config:
            return None
    name = override or config.mm_vision_tower
    if not name:
        raise LlavaError(f"{folder / 'config.json'}: has no mm_vision_tower; is this a LLaVA checkpoint?")
    tower_folder = locate_model(name, "vision tower", relative_to=folder, cache_dir=cache_dir)
    config.mm_vision_config = read_vision_config(tower_folder)
    return tower_folder
