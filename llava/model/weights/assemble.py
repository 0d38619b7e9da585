"""Filling a model built on the meta device from files, every key accounted for.

A `Source` says which tensors of some files become which weights of the model. `fill_model` checks the whole
match first (missing, left over, misshapen) and only then reads, tensor by tensor, into place.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers.initialization import no_init_weights

from llava.errors import LlavaError, library_errors
from llava.model.weights.files import NO_VALUES, WeightFiles, is_harmless
from llava.model.weights.quantized import quantized_parameter

if TYPE_CHECKING:
    from llava.model.configuration import LlavaConfigFields
    from llava.model.language_model import LlavaForCausalLM

log = logging.getLogger(__name__)

_MOST_LAYERS = 500
_READERS = 4
"""Threads that read: one doesn't saturate a disk, nor the memory of the page cache."""


@dataclass
class Source:
    """Tensors of `weights`, by the model's name for them.

    `unused_layers` are the tower's tensors after the selected layer, which the model has no place for, by the names
    that they have in a checkpoint; `unused` are names in the files of what is never needed (the text half of a
    CLIP). Anything else that is neither in `names` nor harmless is an error.
    """

    what: str
    weights: WeightFiles
    names: dict[str, str]
    unused_layers: dict[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    convert: Callable[[str, torch.Tensor], torch.Tensor] | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that weight `name` of the model gets from here."""
        return self.shapes.get(name) or self.weights.shape(self.names[name])

    def read(self, name: str) -> torch.Tensor:
        """The tensor for weight `name`, perhaps memory mapped."""
        tensor = self.weights.read(self.names[name])
        return tensor if self.convert is None else self.convert(name, tensor)

    def copy(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The tensor for weight `name` in memory of its own: a memory-mapped weight would follow the file."""
        file_name = self.names[name]
        stored = self.weights.dtype(file_name)
        target = dtype if stored.is_floating_point else stored
        if self.convert is None and device.type == "cpu" and target == stored:
            return self.weights.copy(file_name)
        return self.read(name).to(device=device, dtype=target, copy=True)


def build_empty(
    model_class: "type[LlavaForCausalLM]", config: "LlavaConfigFields", attn_implementation: str | None = None
) -> "LlavaForCausalLM":
    """A model whose parameters have shapes but no memory; buffers are real.

    How attention is computed is the caller's choice or the library's, never that of a config.json: a hub's repository
    that is named there would be fetched, and its code run.
    """
    config._attn_implementation = attn_implementation
    config._experts_implementation = None
    with (
        library_errors("config.json describes no model that can be built"),
        init_empty_weights(include_buffers=False),
        no_init_weights(),
    ):
        layers = max(config.num_hidden_layers, (config.mm_vision_config or {}).get("num_hidden_layers", 0))
        if layers > _MOST_LAYERS:
            raise LlavaError(f"config.json asks for {layers:,} layers; more than {_MOST_LAYERS} aren't built")
        model = model_class(config)
    model.eval()
    return model


def fill_model(
    model: "LlavaForCausalLM",
    sources: Iterable[Source],
    dtype: torch.dtype,
    device: torch.device | Callable[[str], torch.device],
    fresh: Callable[[str], bool] = lambda name: False,
    quantization_state: Mapping[str, list[str]] | None = None,
) -> None:
    """Give each parameter of `model` its tensor, in `dtype` on its device; later sources take precedence.

    `fresh(name)` says which may be missing from all files: they get torch's own initialisation, done here.
    `quantization_state` is None for a model that isn't quantized; else it names the quantization state that the
    files hold for each weight that is stored quantized.

    Raises:
        LlavaError: a missing, extra or misshapen tensor: its name, the files, the likely cause.
    """
    sources = list(sources)
    chosen = match_sources(model, sources, fresh, quantization_state)
    where = device if callable(device) else lambda name: device
    plain = {
        name: source
        for name, source in chosen.items()
        if quantization_state is None or not _set_quantized(model, name, source, quantization_state, where(name))
    }
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        tensors = pool.map(lambda name: plain[name].copy(name, dtype, where(name)), plain)
        for name, tensor in zip(plain, tensors, strict=True):
            _set_weight(model, name, tensor)
    for source in sources:
        model.get_vision_tower().remember_unused_layers(source.unused_layers, source.weights)
    model.tie_weights()
    _initialise(model, dtype, where)


def _set_weight(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` in the place of parameter or buffer `name`."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters.get(leaf)
    if old is not None:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor


def _set_quantized(model, name: str, source: Source, quantization_state, device: torch.device) -> bool:
    """Put a quantized parameter in the place of weight `name`; False if its module isn't quantized."""
    stored = {key: source.weights.read(key) for key in quantization_state.get(name, ())}
    parameter = quantized_parameter(model, name, source.read(name), stored or None, device)
    if parameter is None:
        return False
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = parameter
    return True


def match_sources(
    model: "LlavaForCausalLM",
    sources: Iterable[Source],
    fresh: Callable[[str], bool] = lambda name: False,
    quantization_state: Mapping[str, list[str]] | None = None,
) -> dict[str, Source]:
    """Which source gives each weight, or the error that says what doesn't fit."""
    state = model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    sources = list(sources)
    quantization_state = quantization_state or {}
    state_keys = {key for keys in quantization_state.values() for key in keys}
    chosen: dict[str, Source] = {}
    for source in sources:
        used = {file_name for name, file_name in source.names.items() if name in wanted}
        expected = used | source.unused | set(source.unused_layers.values()) | state_keys
        extra = [file_name for file_name in source.weights if file_name not in expected and not is_harmless(file_name)]
        if extra:
            raise LlavaError(_describe_extra(source, extra, model))
        chosen.update((name, source) for name, file_name in source.names.items() if file_name in used)
    tied = tied_weights(model)
    for name in tied.keys() & chosen.keys():
        _check_tie(name, tied[name], chosen, sources)
        del chosen[name]
    missing = [name for name in wanted if name not in chosen and name not in tied and not fresh(name)]
    if missing:
        raise LlavaError(_describe_missing(sources, missing))
    for name, source in chosen.items():
        # A 4-bit weight is packed; bitsandbytes knows its shape.
        if name in quantization_state:
            continue
        if source.shape(name) != wanted[name]:
            raise LlavaError(_describe_shape(source, name, wanted[name]))
        key = source.names[name]
        if state[name].is_floating_point() and not source.weights.dtype(key).is_floating_point:
            raise LlavaError(
                f"{source.weights.file_of(key)}: {key} holds {source.weights.dtype(key)}, not floating-point numbers; "
                f"of quantized weights only bitsandbytes' can be read, give the 16-bit checkpoint"
            )
    return chosen


def tied_weights(model: "LlavaForCausalLM") -> dict[str, str]:
    """Weights that are another weight of the model, with its name: `{head: embedding}`, or {} where none are tied."""
    return dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}


def _check_tie(name: str, origin: str, chosen: dict[str, Source], sources: list[Source]) -> None:
    """Check that a tied weight that a file holds all the same is equal to its origin, and leave it out.

    An embedding from a later source (trained rows, an adapter's) replaces an older head too.
    """
    source, of_origin = chosen[name], chosen.get(origin)
    order = [sources.index(one) for one in (source, of_origin) if one is not None]
    if len(order) == 2 and order[0] < order[1]:
        return
    key = source.names[name]
    if source is not of_origin or not torch.equal(source.weights.read(key), source.weights.read(source.names[origin])):
        raise LlavaError(
            f"{source.weights.file_of(key)}: {key} isn't the embedding {origin}, but config.json ties the two; "
            f"set tie_word_embeddings there to false, or remove {key}"
        )


def _initialise(model, dtype, where) -> None:
    """Torch's own initialisation for what no file had (a new projector)."""
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(parameter.is_meta for parameter in own.values()):
            module.to_empty(device="cpu", recurse=False)
            module.to(torch.float32)
            module.reset_parameters()
            module.to(device=where(f"{path}.weight"), dtype=dtype)


def _describe_extra(source: Source, extra: list[str], model) -> str:
    name = extra[0]
    cause = "the config.json next to it describes another model"
    if "lora_" in name:
        cause = "this is a LoRA adapter; give its folder as model_path and the base model as model_base"
    elif name.endswith("image_newline"):
        cause = (
            "this is a LLaVA-NeXT, which ends rows of tiles in a learned vector (mm_patch_merge_type spatial); "
            "such models aren't supported"
        )
    elif "mm_projector" in name:
        cause = f"the projector has another form than mm_projector_type {model.config.mm_projector_type!r} says"
    elif "vision_tower" in name or "vision_model" in name:
        cause = "the tower is not the one that the config describes (mm_vision_tower)"
    elif re.search(r"layers\.\d+\.", name):
        cause = "the model in the file has more layers than its config.json says"
    return (
        f"{source.weights.file_of(name)}: unexpected tensor {name}{_others(extra)} in the {source.what}; likely {cause}"
    )


def _describe_shape(source: Source, name: str, wanted: tuple[int, ...]) -> str:
    found = source.shape(name)
    cause = "the config.json next to it describes another model"
    if 0 in found:
        cause = NO_VALUES
    elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
        cause = (
            "tokens were added to the vocabulary after one of the two was made (32000 rows: a plain language "
            "model or a delta's base; 32003: with the image tokens); take config.json and weights of one folder"
        )
    elif "mm_projector" in name:
        cause = "the projector was trained for another tower or language model"
    elif "vision_tower" in name:
        cause = "the tower's folder holds another size of vision model than the one the model was trained with"
    file_name = source.names[name]
    return (
        f"{source.weights.file_of(file_name)}: {file_name} has shape {list(found)}, "
        f"but the model needs {list(wanted)}; likely {cause}"
    )


def _describe_missing(sources: list[Source], missing: list[str]) -> str:
    name = missing[0]
    part, cause = "", "the checkpoint is incomplete, or its config.json describes another model"
    if "vision_tower" in name:
        part, cause = "vision tower", "the tower's folder doesn't hold the whole vision model"
    elif "mm_projector" in name:
        part, cause = (
            "projector",
            (
                "this is a language model without a projector; train one (stage 1), or give the folder with "
                "mm_projector.bin as model_path and this one as model_base"
            ),
        )
    looked = [source for source in sources if source.what == part] or sources
    files = [str(path) for source in looked for path in source.weights.files]
    listed = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    return f"missing tensor {name}{_others(missing)}; looked in {listed}; likely {cause}"


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
