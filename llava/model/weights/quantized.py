"""8- and 4-bit language models through bitsandbytes; tower, projector and head keep their precision.

On a CPU 4-bit weights are dequantized and multiplied (llava.model.weights.linear4bit), never repacked for
AVX512-BF16: the answers are exact and the same on every processor, any width works, and what is saved is what was read.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

from llava.errors import LlavaError, require

log = logging.getLogger(__name__)

KEPT_MODULES = ("model.vision_tower", "model.mm_projector", "lm_head")
"""What `load_8bit` and `load_4bit` leave in full precision."""

_FOUR_BIT = ("absmax", "quant_map", "quant_state.bitsandbytes")
_NESTED = ("nested_absmax", "nested_quant_map")
_STATISTICS = re.compile(
    r"(?P<weight>.+\.weight)\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
    r"|(?P<module>.+)\.(?:SCB|weight_format)"
)


@dataclass(frozen=True)
class Quantization:
    """How a language model is quantized: in 8 or 4 `bits`, 0 for not at all.

    With 4 bits `quant_type` is `nf4` or `fp4`, and `double_quant` quantizes the scales of the blocks too, which saves
    0.4 bits per weight; None is bitsandbytes' usual choice (nf4, True) or a quantized checkpoint's own.
    """

    bits: int = 0
    quant_type: str | None = None
    double_quant: bool | None = None

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """bitsandbytes' settings: LLM.int8, or 4 bits computing in `dtype`."""
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT_MODULES))
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=self.quant_type or "nf4",
            bnb_4bit_use_double_quant=self.double_quant is not False,
            llm_int8_skip_modules=list(KEPT_MODULES),
        )

    def check_wanted(self, wanted: "Quantization", where: Path) -> None:
        """Refuse settings other than these, which the weights in `where` are stored with.

        Raises:
            LlavaError: says how the weights are stored.
        """
        if wanted.bits and wanted.bits != self.bits:
            raise LlavaError(f"{where}: the weights are stored in {self.bits} bits, not {wanted.bits}; drop the flag")
        if wanted.bits != 4:
            return
        if wanted.quant_type not in (None, self.quant_type) or wanted.double_quant not in (None, self.double_quant):
            raise LlavaError(
                f"{where}: the weights are stored as {self.quant_type} {'with' if self.double_quant else 'without'} "
                f"double quantization; leave out the flags that say otherwise"
            )


def stored_quantization(quantization_state: Mapping[str, list[str]]) -> Quantization:
    """How a checkpoint was quantized, by the names of its quantization state."""
    names = [name for more in quantization_state.values() for name in more]
    if any(name.endswith(".SCB") for name in names):
        return Quantization(8)
    kind = next(name for name in names if _FOUR_BIT[-1] in name).rpartition("__")[2]
    return Quantization(4, kind, any(name.endswith(_NESTED[0]) for name in names))


def split_quantization_state(names: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Names of a checkpoint's weights, and for each quantized one the names of its quantization state."""
    plain, quantization_state = [], defaultdict(list)
    for name in names:
        match = _STATISTICS.fullmatch(name)
        if match:
            quantization_state[match["weight"] or f"{match['module']}.weight"].append(name)
        else:
            plain.append(name)
    for weight, keys in quantization_state.items():
        _check_complete(weight, {key.removeprefix(f"{weight}.").split("__")[0] for key in keys})
    return plain, dict(quantization_state)


def _check_complete(weight: str, found: set[str]) -> None:
    needed = set(_FOUR_BIT)
    if found & set(_NESTED):
        needed |= set(_NESTED)
    if any(name.endswith("SCB") for name in found):
        needed = set()
    if not needed <= found:
        raise LlavaError(
            f"{weight} is stored quantized, but {', '.join(sorted(needed - found))} is missing next to it; "
            f"the checkpoint is incomplete"
        )


def prepare_quantized(model: PreTrainedModel, config: BitsAndBytesConfig, quantized: set[str] | None) -> None:
    """Replace the Linear modules of a model on the meta device by bitsandbytes' ones.

    `quantized` names the weights that come quantized from the file; None if they are quantized while loading.

    Raises:
        LlavaError: bitsandbytes isn't installed.
    """
    require("bitsandbytes", "quantized")
    if quantized is not None:
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        config.llm_int8_skip_modules = sorted(name for name in linear if f"{name}.weight" not in quantized)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=quantized is not None)
    model.hf_quantizer = quantizer
    quantizer.preprocess_model(model=model, device_map=None)
    from llava.model.weights.linear4bit import compute_exactly

    compute_exactly(model)


def finish_quantized(model: PreTrainedModel) -> None:
    """Mark a filled model as quantized, as transformers, peft and the Trainer expect it."""
    cast(HfQuantizer, model.hf_quantizer).postprocess_model(model)


def quantized_parameter(
    model: PreTrainedModel,
    name: str,
    tensor: torch.Tensor,
    quantization_state: dict[str, torch.Tensor] | None,
    device: torch.device,
) -> torch.nn.Parameter | None:
    """The bitsandbytes parameter for weight `name`, None if its module isn't quantized.

    `tensor` is the full weight, which is quantized here, or with `quantization_state` the already quantized one.
    """
    bitsandbytes = require("bitsandbytes", "quantized")
    path, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    module = model.get_submodule(path)
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        if quantization_state is None:
            old = module.weight
            return bitsandbytes.nn.Params4bit(
                tensor,
                requires_grad=False,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                quant_storage=old.quant_storage,
                module=module,
            ).to(device)
        return bitsandbytes.nn.Params4bit.from_prequantized(
            tensor.to(device, copy=True), quantization_state, requires_grad=False, device=device, module=module
        )
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        if quantization_state is None:
            return bitsandbytes.nn.Int8Params(tensor, requires_grad=False, has_fp16_weights=False).to(device)
        weight_format = next(
            (value for key, value in quantization_state.items() if key.endswith("weight_format")), None
        )
        if weight_format is not None and int(weight_format) != 0:
            raise LlavaError(f"{name}: only row-major 8-bit weights can be read, this one is in format {weight_format}")
        scale = next(value for key, value in quantization_state.items() if key.endswith("SCB"))
        return bitsandbytes.nn.Int8Params(
            tensor, requires_grad=False, has_fp16_weights=False, CB=tensor, SCB=scale.float()
        ).to(device)
    return None
