"""From a LLaVA checkpoint to the two GGUF files that llama.cpp loads: language model, and tower with projector."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

from llava.bars import tqdm
from llava.conversation import get_template
from llava.errors import LlavaError
from llava.folders import check_space, check_target, stage
from llava.model.checkpoint.resolved import ResolvedCheckpoint, resolve_checkpoint
from llava.model.convert.chat_template import chat_template
from llava.model.convert.model_card import write_model_card
from llava.model.families import EMBEDDING, HEAD, family_of
from llava.model.gguf.names import ARCHITECTURE, ROPE_FREQS, language_names, rope_factors, rotary_pairs
from llava.model.gguf.vision import LAST, POSITIONS, add_vision_fields, vision_tensors, widening_of
from llava.model.gguf.vocabulary import add_vocabulary
from llava.model.loader import load_image_processor
from llava.model.tokenizer import load_tokenizer_of
from llava.model.towers.base import TOWER_PREFIX

log = logging.getLogger(__name__)

TYPES = ("f32", "f16", "q8_0", "q4_0")
_FAMILIES = ("llama", "mistral")
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_NUMPY: dict[GGMLQuantizationType, Any] = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
"""The types that aren't quantized."""
_OF_IMAGES = (TOWER_PREFIX, "model.mm_projector.")
_BLOCK = 32
"""Values that share a scale in q8_0 and q4_0."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file; `make` gives it when its turn comes, float32 or whatever the checkpoint has."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    make: Callable[[], torch.Tensor]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In bytes for a quantized type."""
        if self.type in _NUMPY:
            return self.shape
        return quants.quant_shape_to_byte_shape(self.shape, self.type)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.stored_shape)) * np.dtype(_NUMPY.get(self.type, np.uint8)).itemsize


def export_gguf(
    model_path: str | Path,
    output: str | Path,
    model_base: str | Path | None = None,
    *,
    vision_tower: str | Path | None = None,
    kind: str = "f16",
    class_token: str = LAST,
    overwrite: bool = False,
) -> Path:
    """Write `model-KIND.gguf` and `mmproj-f16.gguf` (f32 for f32) into the folder `output`.

    Args:
        kind: of the language model's matrices, one of `TYPES`; with q4_0 embedding and head are q8_0.
        class_token: where llama.cpp puts the tower's: `last` (every one of today), or `first`, as it should
            (llava.model.gguf.class_token).

    Raises:
        LlavaError: what llama.cpp's LLaVA has no place for (another family, tower or projector, several tiles), and
            `resolve_checkpoint`'s.
    """
    if kind not in TYPES:
        raise LlavaError(f"unknown type {kind!r} of a GGUF file; one of {', '.join(TYPES)}")
    output = check_target(output, overwrite)
    checkpoint = resolve_checkpoint(model_path, model_base, vision_tower)
    _check_expressible(checkpoint)
    half = "f32" if kind == "f32" else "f16"
    language = _language_tensors(checkpoint, kind)
    # A linear projector's second layer moves large values back: they have to stay as they are.
    exact = ("mm.", POSITIONS) if checkpoint.config.mm_projector_type == "linear" else POSITIONS
    tensors = vision_tensors(checkpoint, class_token)
    widening = widening_of(checkpoint) if class_token == LAST else None
    seen = [
        Stored(name, shape, _own_type(shape, "f32" if name.startswith(exact) else half), make)
        for name, shape, make in (widening.tensors(tensors) if widening else tensors)
    ]
    check_space(output, sum(tensor.nbytes for tensor in (*language, *seen)))
    with stage(output, overwrite=overwrite) as folder:
        writer = GGUFWriter(folder / f"model-{kind}.gguf", ARCHITECTURE)
        _add_language_fields(writer, checkpoint, kind)
        _write(writer, language)
        writer = GGUFWriter(folder / f"mmproj-{half}.gguf", "clip")
        processor = load_image_processor([*checkpoint.parts.folders, checkpoint.parts.tower_folder], checkpoint.model)
        writer.add_file_type(_FILE_TYPES[half])
        add_vision_fields(writer, checkpoint, processor, widening)
        _write(writer, seen)
        write_model_card(
            folder,
            "A LLaVA checkpoint as two GGUF files, for llama.cpp and the programs that are built on it.",
            base=str(model_base) if model_base else None,
            source=str(model_path),
            notes=(f"Language model: {kind}; tower and projector: {half}.",),
        )
    return output


def _check_expressible(checkpoint: ResolvedCheckpoint) -> None:
    config, where = checkpoint.config, checkpoint.folder
    name = family_of(config).name
    if name not in _FAMILIES:
        raise LlavaError(f"{where}: the GGUF export takes language models of {' or '.join(_FAMILIES)}, this is {name}")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise LlavaError(f"{where}: attention within a window of {window} has no place in the GGUF file's architecture")
    if config.image_aspect_ratio in {"anyres", "keep"}:
        raise LlavaError(
            f"{where}: image_aspect_ratio {config.image_aspect_ratio!r} isn't what llama.cpp does to images; answers "
            f"would differ without a word; serve the native folder"
        )


def _own_type(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    """Vectors stay float32, as llama.cpp wants them; rows that aren't whole blocks are halves."""
    wanted = GGMLQuantizationType[kind.upper()]
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if wanted not in _NUMPY and shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def _language_tensors(checkpoint: ResolvedCheckpoint, kind: str) -> list[Stored]:
    config = checkpoint.config
    tensors = []
    for name, ours in language_names(config.num_hidden_layers).items():
        if ours == HEAD and config.tie_word_embeddings:
            continue
        shape = checkpoint.shape(ours)
        stored = _own_type(shape, "q8_0" if kind == "q4_0" and ours in (EMBEDDING, HEAD) else kind)
        tensors.append(Stored(name, shape, stored, partial(_language_tensor, checkpoint, ours)))
    known = set(language_names(config.num_hidden_layers).values())
    rest = [name for name in checkpoint.names if name not in known and not name.startswith(_OF_IMAGES)]
    if rest:
        raise LlavaError(f"{checkpoint.folder}: {rest[0]} has no place in a GGUF file of this architecture")
    halves = sum(tensor.type == GGMLQuantizationType.F16 for tensor in tensors)
    if halves and kind not in ("f16", "f32"):
        log.warning("%d matrices have rows that aren't multiples of %d: they are written as f16", halves, _BLOCK)
    if _rope(config).get("rope_type") == "llama3":
        factors = rope_factors(config)
        tensors.append(Stored(ROPE_FREQS, tuple(factors.shape), GGMLQuantizationType.F32, lambda: factors))
    return tensors


def _language_tensor(checkpoint: ResolvedCheckpoint, name: str) -> torch.Tensor:
    tensor, config = checkpoint.read(name), checkpoint.config
    if ".q_proj." in name:
        return rotary_pairs(tensor, config.num_attention_heads)
    if ".k_proj." in name:
        return rotary_pairs(tensor, config.num_key_value_heads)
    return tensor


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _add_language_fields(writer: GGUFWriter, checkpoint: ResolvedCheckpoint, kind: str) -> None:
    config = checkpoint.config
    folders = checkpoint.parts.folders
    tokenizer = load_tokenizer_of(folders, folders[0])
    writer.add_file_type(_FILE_TYPES[kind])
    add_sizes(writer, config)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    scaling = rope.get("rope_type", "default")
    if scaling == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif scaling not in ("default", "llama3"):
        raise LlavaError(f"{checkpoint.folder}: positions scaled by {scaling!r} can't be written as GGUF")
    template = get_template(config.conversation_template)
    add_vocabulary(writer, tokenizer, config.vocab_size, template.stop_str)
    # llama.cpp writes the begin token itself, and its own mark where an image stands.
    writer.add_chat_template(chat_template(template, ""))


def add_sizes(writer: GGUFWriter, config: Any) -> None:
    """How large a language model and its parts are, by its transformers' configuration."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)


def _write(writer: GGUFWriter, tensors: list[Stored]) -> None:
    """One tensor at a time: only one is in memory."""
    for tensor in tensors:
        quantized = tensor.type not in _NUMPY
        dtype = np.dtype(np.uint8 if quantized else _NUMPY[tensor.type])
        raw = tensor.type if quantized else None
        writer.add_tensor_info(tensor.name, tensor.stored_shape, dtype, tensor.nbytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tqdm(tensors, desc="tensors", unit="tensor", leave=False, disable=None):
        values = tensor.make().float().contiguous().numpy()
        writer.write_tensor_data(quants.quantize(values, tensor.type))
    writer.close()
