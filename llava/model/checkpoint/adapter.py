"""LoRA directories: the adapter's update added to each weight while it is read, so nothing is held twice."""

import math
import re
from pathlib import Path
from typing import Any

import torch

from llava.errors import LlavaError
from llava.model.weights.files import WeightFiles
from llava.records import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")

_PAIR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


class LoraAdapter:
    """The adapter of a folder. `adds_to` names the weights that it changes, `overrides` those it replaces.

    Raises:
        LlavaError: no adapter file, half of a pair, or a kind of adapter that isn't plain LoRA.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        self._refuse_other_kinds()
        path = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
        if path is None:
            raise LlavaError(f"{folder}: no adapter weights found (looked for {' and '.join(ADAPTER_FILES)})")
        self.weights = WeightFiles([path])
        self._pairs: dict[str, dict[str, str]] = {}
        self.overrides: dict[str, str] = {}
        for file_name in self.weights:
            match = _PAIR.fullmatch(file_name)
            if match:
                self._pairs.setdefault(native_name(match[1]) + ".weight", {})[match[2]] = file_name
            elif "lora_" in file_name:
                raise LlavaError(f"{path}: {file_name} is no part of a plain LoRA adapter; merge it with peft")
            else:
                self.overrides[native_name(file_name)] = file_name
        for name, pair in self._pairs.items():
            if len(pair) != 2:
                raise LlavaError(f"{path}: {name} has lora_{next(iter(pair))} but not its other half")

    @property
    def adds_to(self) -> set[str]:
        return set(self._pairs)

    @property
    def base_name(self) -> str | None:
        """The base model that the adapter was trained on, as recorded with it."""
        return self.config.get("base_model_name_or_path")

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight + scale · B · A`, computed in float32; `weight` itself where the adapter leaves it alone."""
        pair = self._pairs.get(name)
        if pair is None:
            return weight
        down, up = (self.weights.read(pair[half]).float() for half in "AB")
        update = up @ down
        if self.config.get("fan_in_fan_out"):
            update = update.T
        if update.shape != weight.shape:
            raise LlavaError(
                f"{self.weights.file_of(pair['A'])}: the update of {name} has shape {list(update.shape)}, "
                f"the base's weight {list(weight.shape)}; the adapter belongs to another base "
                f"(it records {self.base_name})"
            )
        return update.mul_(self._scale(name, down.shape[0])).add_(weight)

    def _scale(self, name: str, rank: int) -> float:
        alpha = self.config.get("lora_alpha", rank)
        module = name.removesuffix(".weight")
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(?:.*\.)?{pattern}", module):
                alpha = value
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _refuse_other_kinds(self) -> None:
        kind = self.config.get("peft_type", "LORA")
        special = "DoRA" if self.config.get("use_dora") else None
        if kind != "LORA" or special:
            raise LlavaError(
                f"{self.folder / ADAPTER_CONFIG}: adapters of kind {special or kind} aren't supported; "
                f"merge it into its base with peft (merge_and_unload) and give the merged folder"
            )


def native_name(name: str) -> str:
    """LLaVA's name of a tensor that peft, or LLaVA's LoRA training, wrote with its wrappers in front."""
    name = name.removeprefix("base_model.")
    while name.startswith(("model.model.", "model.lm_head")):
        name = name.removeprefix("model.")
    return name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def non_lora_file(folder: Path) -> Path | None:
    """The file of fully trained weights that belongs to an adapter (projector, sometimes embeddings or tower)."""
    return next((folder / name for name in NON_LORA_FILES if (folder / name).is_file()), None)
