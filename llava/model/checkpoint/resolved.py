"""A checkpoint of any layout as one list of tensors under LLaVA's names, read one at a time.

The commands that rewrite checkpoints read through this: what `load_pretrained_model` would load, adapter merged,
projector and tower in place, every key accounted for, without the model in memory.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from llava.errors import LlavaError
from llava.model.checkpoint.adapter import ADAPTER_CONFIG
from llava.model.checkpoint.layouts import Parts, open_checkpoint
from llava.model.families import model_class_of
from llava.model.language_model import LlavaForCausalLM
from llava.model.weights.assemble import Source, build_empty, match_sources
from llava.model.weights.locate import locate_model
from llava.model.weights.shards import Planned, fill_from

_SETTINGS = ("config.json", ADAPTER_CONFIG)
"""Files that say what is computed of the weights: an adapter's scale, say."""


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """`names` are in the order of the model; `model` has shapes but no memory; of `files` the tensors depend."""

    folder: Path
    parts: Parts
    model: LlavaForCausalLM
    names: dict[str, Source]
    files: tuple[Path, ...]

    @property
    def config(self):
        return self.parts.config

    def shape(self, name: str) -> tuple[int, ...]:
        source = self.names[name]
        return source.weights.shape(source.unused_layers[name]) if name in source.unused_layers else source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """As stored; merging an adapter doesn't change it."""
        source = self.names[name]
        return source.weights.dtype(source.unused_layers.get(name) or source.names[name])

    def read(self, name: str) -> torch.Tensor:
        source = self.names[name]
        return source.weights.read(source.unused_layers[name]) if name in source.unused_layers else source.read(name)

    def planned(self, name: str, new_name: str | None = None, dtype: torch.dtype | None = None) -> Planned:
        """Tensor `name` for `write_shards`."""
        return Planned(
            new_name or name, self.shape(name), dtype or self.dtype(name), lambda: fill_from(self.read(name))
        )


def resolve_checkpoint(
    model_path: str | Path,
    model_base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> ResolvedCheckpoint:
    """Open a checkpoint as `load_pretrained_model` does; the tower's last block and norm are there if a file has them.

    Raises:
        LlavaError: `open_checkpoint`'s; a missing, extra or misshapen tensor; 8- or 4-bit weights.
    """
    folder = locate_model(model_path)
    base_folder = None if model_base is None else locate_model(model_base, "base model", relative_to=folder)
    parts = open_checkpoint(folder, base_folder, vision_tower)
    if parts.quantized:
        raise LlavaError(
            f"{parts.weights.files[0].parent}: the weights are stored in 8 or 4 bits and can't be rewritten exactly; "
            f"give the 16-bit checkpoint"
        )
    model = build_empty(model_class_of(parts.config), parts.config)
    sources = parts.sources(model)
    chosen = match_sources(model, sources)
    for source in sources:
        chosen.update((name, source) for name in source.unused_layers)
    files = dict.fromkeys(path for source in sources for path in source.weights.files)
    settings = [path for place in parts.folders for name in _SETTINGS if (path := place / name).is_file()]
    return ResolvedCheckpoint(folder, parts, model, chosen, (*files, *settings))
