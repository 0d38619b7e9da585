"""LoRA directories: the adapter's update added to each weight while it is read, so nothing is held twice."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llava.errors import LlavaError
from llava.model.weights.files import NO_VALUES, WeightFiles
from llava.records import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")

_PAIR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")
"""What torch.compile and data-parallel training leave in the names."""

_MOST_NAME = 300
"""Characters of a tensor's name."""
_MOST_REPETITIONS = 16
"""In all expressions of an adapter together, one in each: nested or side by side, a few could take for ever."""

_READ = frozenset({
    "alpha_pattern", "base_model_name_or_path", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "peft_type",
    "r", "rank_pattern", "use_rslora",
})  # fmt: skip
_OF_TRAINING = frozenset({
    "auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "merge_weights", "modules_to_save", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type", "velora_config",
})  # fmt: skip
"""Of peft 0.21's LoraConfig and older ones: what is trained and how. The file's tensors say the rest."""
_OTHER_KINDS = MappingProxyType(
    {
        "use_dora": "DoRA",
        "use_qalora": "QALoRA",
        "use_bdlora": "BD-LoRA",
        "alora_invocation_tokens": "activated LoRA",
        "monteclora_config": "MonteCLoRA",
        "kasa_config": "KaSA",
        "arrow_config": "Arrow",
        "layer_replication": "LoRA with layer_replication",
        "lora_bias": "LoRA with lora_bias",
        "target_parameters": "LoRA with target_parameters",
        "trainable_token_indices": "LoRA with trainable_token_indices",
        "megatron_config": "LoRA of Megatron",
    }
)
"""Fields that change what is computed, and what such an adapter is called."""
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Ways to begin that leave the base's weights as they are; any other may have changed them."""


class LoraAdapter:
    """The adapter of a folder. `adds_to` names the weights that it changes, `overrides` those it replaces.

    Raises:
        LlavaError: no adapter file, half of a pair, a tensor without values, or a kind of adapter that isn't plain
            LoRA: each field of its configuration is read here, known to change nothing, or refused.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        self._check_config()
        path = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
        if path is None:
            raise LlavaError(f"{folder}: no adapter weights found (looked for {' and '.join(ADAPTER_FILES)})")
        self.weights = WeightFiles([path])
        self._halves: dict[str, dict[str, str]] = {}
        self._others: dict[str, str] = {}
        for file_name in self.weights:
            if 0 in self.weights.shape(file_name):
                raise LlavaError(f"{path}: {file_name} has no values; likely {NO_VALUES}")
            match = _PAIR.fullmatch(file_name)
            if match and len(self.weights.shape(file_name)) == 2:
                self._halves.setdefault(match[1], {})[match[2]] = file_name
                if len(file_name) > _MOST_NAME:
                    raise LlavaError(f"{path}: the name {file_name} is longer than {_MOST_NAME} characters")
            elif "lora_" in file_name:
                raise LlavaError(f"{path}: {file_name} is no part of a plain LoRA adapter; merge it with peft")
            elif ".original_module." not in file_name:  # the base's own, next to what replaces it
                self._others[file_name] = file_name
        for name, pair in self._halves.items():
            if len(pair) != 2:
                raise LlavaError(f"{path}: {name} has lora_{next(iter(pair))} but not its other half")
            ranks = self.weights.shape(pair["A"])[0], self.weights.shape(pair["B"])[1]
            if ranks[0] != ranks[1]:
                raise LlavaError(f"{path}: the halves of {name} have the ranks {ranks[0]} and {ranks[1]}")
        self.rename(lambda name: name)

    def rename(self, rename: Callable[[str], str | None]) -> None:
        """Take the base's tensors by the names that `rename` gives to those that `native_name` gives."""

        def own(name: str) -> str:
            name = native_name(name)
            return rename(name) or name

        self._modules = {own(f"{module}.weight"): module for module in self._halves}
        self.overrides = {own(name): file_name for name, file_name in self._others.items()}

    @property
    def adds_to(self) -> set[str]:
        return set(self._modules)

    @property
    def base_name(self) -> str | None:
        """The base model that the adapter was trained on, as recorded with it."""
        return self.config.get("base_model_name_or_path")

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight + scale · B · A`, computed in float32; `weight` itself where the adapter leaves it alone."""
        module = self._modules.get(name)
        if module is None:
            return weight
        pair = self._halves[module]
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
        return update.mul_(self._scale(module, down.shape[0])).add_(weight)

    def _scale(self, module: str, rank: int) -> float:
        # peft's own rule: the first key that matches the end of the module's path in the model that it wrapped.
        path = _WRAPPERS.sub("", module).removeprefix("base_model.model.")
        patterns = self.config.get("alpha_pattern") or {}
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)
        alpha = self.config.get("lora_alpha", 8) if key is None else patterns[key]
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _check_config(self) -> None:
        path = self.folder / ADAPTER_CONFIG
        if not isinstance(self.config, dict):
            raise LlavaError(f"{path}: expected an object with the adapter's settings")
        kind, begin = self.config.get("peft_type", "LORA"), self.config.get("init_lora_weights", True)
        special = None if kind == "LORA" else str(kind)
        for name, value in self.config.items():
            if special or not value or name in _READ or name in _OF_TRAINING:
                continue
            special = _OTHER_KINDS.get(name, f"LoRA with {name}, which isn't known,")
        if special is None and not isinstance(begin, bool) and begin not in (None, *_HARMLESS_INITS):
            raise LlavaError(
                f"{path}: init_lora_weights {begin!r} may have changed the base's own weights; make plain LoRA of it "
                f"with peft (save_pretrained with path_initial_model_for_weight_conversion), or merge it with peft "
                f"(merge_and_unload) and give the merged folder"
            )
        if special:
            raise LlavaError(
                f"{path}: adapters of kind {special} aren't supported; merge it into its base with peft "
                f"(merge_and_unload) and give the merged folder"
            )
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise LlavaError(f"{path}: alpha_pattern has to be an object of numbers by name")
        for name, value in {"lora_alpha": self.config.get("lora_alpha", 8), **patterns}.items():
            try:
                usable = not isinstance(value, bool) and math.isfinite(value)
                re.compile(name)
            except (TypeError, re.error, RecursionError, OverflowError):
                usable = False
            if not usable:
                raise LlavaError(f"{path}: {name!r} has the value {value!r:.100}; it has to be a number")
        bare = [re.sub(r"\\.", "", name) for name in patterns]
        repetitions = [sum(name.count(mark) for mark in "*+?{") for name in bare]
        if any("(" in name for name in bare) or max(repetitions, default=0) > 1 or sum(repetitions) > _MOST_REPETITIONS:
            raise LlavaError(
                f"{path}: a name in alpha_pattern may have no groups and one repetition, {_MOST_REPETITIONS} in all; "
                f"merge the adapter into its base with peft (merge_and_unload) and give the merged folder"
            )


def native_name(name: str) -> str:
    """LLaVA's name of a tensor that peft, or LLaVA's LoRA training, wrote with its wrappers in front."""
    name = _WRAPPERS.sub("", name).removeprefix("base_model.")
    while name.startswith(("model.model.", "model.lm_head")):
        name = name.removeprefix("model.")
    name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
    return name.replace(".base_layer.", ".")


def non_lora_file(folder: Path) -> Path | None:
    """The file of fully trained weights that belongs to an adapter (projector, sometimes embeddings or tower)."""
    return next((folder / name for name in NON_LORA_FILES if (folder / name).is_file()), None)
