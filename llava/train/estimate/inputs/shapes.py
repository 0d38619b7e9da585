"""The model that a run would load or build: the right shapes and dtypes, no weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.errors import LlavaError
from llava.folders import expanded
from llava.images import ImageProcessor
from llava.model import LoadedModel
from llava.model.build import llava_config
from llava.model.checkpoint.config import read_config
from llava.model.families import model_class_of
from llava.model.loader import context_length
from llava.model.tokenizer import load_tokenizer
from llava.model.towers import read_vision_config
from llava.model.towers.clip import known_vision_config
from llava.model.weights.assemble import build_empty
from llava.model.weights.locate import locate_model
from llava.model.weights.quantized import Quantization, finish_quantized, prepare_quantized
from llava.train.arguments import Arguments
from llava.train.estimate.inputs.known_models import KNOWN
from llava.train.prepare_model import is_language_model, load_dtype, make_ready, new_model_fields

DEFAULT_TOWER = "openai/clip-vit-large-patch14"
"""Where neither flags nor checkpoint name one."""
BLOCK, SCALES = 64, 256
"""Numbers under one scale, and scales under one scale, of 4-bit weights."""


class TextlessTokenizer(PreTrainedTokenizerFast):
    """Has the right number of tokens and no text in them."""


def shaped_model(arguments: Arguments, mode: FakeTensorMode) -> LoadedModel:
    """What `prepare_model` would return for these arguments, with tensors of `mode`.

    The tokenizer is the folder's own where there is one, else a `TextlessTokenizer`.

    Raises:
        LlavaError: the model is neither a folder nor known by name, or its config can't be used.
    """
    with _folder(arguments.model.model_name_or_path) as folder:
        is_plain = is_language_model(folder)
        config = _new_config(folder, arguments) if is_plain else _own_config(folder, arguments)
        dtype = load_dtype(folder, arguments)
        tokenizer = _tokenizer(folder, config.vocab_size)
    model = build_empty(model_class_of(config), config, arguments.model.attn_implementation)
    bits = arguments.training.bits
    if bits < 16:
        prepare_quantized(model, Quantization(bits).config(dtype), None)
    with mode:
        _fill(model, mode, dtype)
        if bits < 16:
            finish_quantized(model)
        processor = ImageProcessor.from_pretrained(model.get_vision_tower().default_image_settings())
        loaded = LoadedModel(tokenizer, model, processor, context_length(config))
        make_ready(loaded, arguments)
    return loaded


def forget_content(model: nn.Module, mode: FakeTensorMode) -> None:
    """Take the content from parameters that were added to a model since (adapters)."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not isinstance(parameter, FakeTensor):
                kept = mode.from_tensor(parameter.detach())
                module._parameters[name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)


@contextmanager
def _folder(name: str) -> Iterator[Path]:
    """The folder of a model; for one known by name, a passing folder with its config.json."""
    if name not in KNOWN:
        if not expanded(name).is_dir() and name.count("/") != 1:
            raise LlavaError(f"--model_name_or_path {name}: no such folder, and none of {', '.join(KNOWN)}")
        yield locate_model(name)
        return
    with TemporaryDirectory() as folder:
        config = KNOWN[name]
        config.dtype = "float16"
        config.save_pretrained(folder)
        yield Path(folder)


def _new_config(folder: Path, arguments: Arguments):
    tower = arguments.model.vision_tower or DEFAULT_TOWER
    return llava_config(folder, tower, _vision_config(tower), new_model_fields(arguments.model))


def _own_config(folder: Path, arguments: Arguments):
    config = read_config(folder)
    if arguments.model.vision_tower or not config.mm_vision_config:
        tower = arguments.model.vision_tower or config.mm_vision_tower or DEFAULT_TOWER
        config.mm_vision_config = _vision_config(tower)
    return config


def _vision_config(tower: str) -> dict[str, Any]:
    return known_vision_config(tower) or read_vision_config(locate_model(tower, "vision tower"))


def _tokenizer(folder: Path, size: int) -> PreTrainedTokenizerBase:
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return load_tokenizer(folder)
    words = {f"<{number}>": number for number in range(size)}
    return TextlessTokenizer(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), unk_token="<0>", pad_token="<0>"
    )


def _fill(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Give each parameter a tensor of its shape, and each buffer one without its content."""
    module: Any
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if type(parameter).__name__ in QUANTIZED:
                shape = torch.Size([module.out_features, module.in_features])
                module._parameters[name] = QUANTIZED[type(parameter).__name__](shape, dtype)
            elif parameter is not None:
                kept = dtype if parameter.is_floating_point() else parameter.dtype
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=kept), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    model.tie_weights()  # type: ignore[operator]


def _four_bit(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """A bitsandbytes weight of this shape: half a byte per number, a scale per block, the scales quantized too."""
    from bitsandbytes.functional import QuantState

    blocks = -(-shape.numel() // BLOCK)
    scales = QuantState(torch.empty(-(-blocks // SCALES)), code=torch.empty(256), blocksize=SCALES, dtype=torch.float32)
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8), shape=shape, code=torch.empty(16), blocksize=BLOCK,
        quant_type="nf4", dtype=dtype, offset=torch.empty(()), state2=scales,
    )  # fmt: skip
    packed = torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8)
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    # As bitsandbytes' own class has them, which can't be without content.
    parameter.quant_state, parameter.quant_type, parameter.compress_statistics = state, "nf4", True
    return parameter


def _eight_bit(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """A bitsandbytes weight of this shape: a byte per number, a float32 scale per row."""
    parameter: Any = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
    parameter.CB, parameter.SCB, parameter.has_fp16_weights = parameter.data, torch.empty(shape[0]), False
    return parameter


QUANTIZED = {"Params4bit": _four_bit, "Int8Params": _eight_bit}
"""How a weight without content is made, by the name of bitsandbytes' class of it."""
