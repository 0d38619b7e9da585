"""From a GGUF file (llama.cpp's) of a language model to a folder in transformers' layout, by its own reader.

What that reader leaves out without a word is done here or refused: ids of special tokens, the scaling of positions
(LLaMA-3.1's `rope_freqs`), vocabularies that are cut into single digits first, and any tensor that has no place.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.errors import LlavaError, first_line, library_errors
from llava.folders import check_space, check_target, stage
from llava.model.convert.model_card import write_model_card
from llava.model.families import HEAD
from llava.model.gguf.header import check_header
from llava.model.gguf.names import ARCHITECTURE, DIGITS_APART, ROPE_FREQS, known_cuts, language_names, rope_factors
from llava.model.tokenizer import save_tokenizer
from llava.model.weights.shards import MAX_SHARD_BYTES, RESUMABLE, planned_tensor, write_shards

log = logging.getLogger(__name__)

_NAME = "model.gguf"
_GPT2_CUTS = {"default", "gpt-2", "gpt2"}
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_NORMAL, _CONTROL = 1, 3
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LLAMA_3_POSITIONS = 8192
"""`original_max_position_embeddings` of all models that `rope_freqs` was made for."""


def import_gguf(
    source: Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a GGUF file of LLaMA's architecture (any type of tensor that the package `gguf` unpacks) as a folder.

    Args:
        dtype: of the weights; by default the file's own, float32 if it is quantized.

    Raises:
        LlavaError: not a GGUF file, another architecture, a tensor or a vocabulary that would not be the file's.
    """
    output = check_target(output, overwrite)
    file = _open(source)
    dtype = dtype or _own_dtype(file)
    with library_errors(f"{source}: no language model that can be imported"):
        model, tokenizer = _read(file, source, dtype)
    config = model.config
    state = {
        name: tensor for name, tensor in model.state_dict().items() if not (config.tie_word_embeddings and name == HEAD)
    }
    tensors = [
        planned_tensor(name, tensor.shape, dtype, partial(torch.Tensor.detach, tensor))
        for name, tensor in state.items()
    ]
    check_space(output, sum(tensor.nbytes for tensor in tensors))
    with stage(output, overwrite=overwrite, resume=RESUMABLE) as folder:
        write_shards(folder, tensors, [source], max_shard_bytes=max_shard_bytes)
        save_tokenizer(tokenizer, folder)
        config.save_pretrained(folder)
        generation = model.generation_config
        generation.update(**_special_ids(file) | {"eos_token_id": _end_ids(file)})
        generation.save_pretrained(folder)
        kinds = ", ".join(sorted({tensor.tensor_type.name for tensor in file.tensors}))
        write_model_card(
            folder,
            f"A language model from a GGUF file ({kinds}), in {str(dtype).removeprefix('torch.')}.",
            source=source.name,
        )
    return output


def _read(file: GGUFReader, source: Path, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model with the configuration that the file describes, and its tokenizer."""
    rope = _rope(file, source)
    _check_blocks(file, source)
    with _alone(source) as place:
        model, tokenizer = _read_model(place, source, dtype), _read_tokenizer(place, source, file)
    _check_tensors(file, model, source)
    config = model.config
    if rope is not None:
        config.rope_parameters = dict(config.rope_parameters) | rope
    for name, value in _special_ids(file).items():
        setattr(config, name, value)
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    for name in ("_model_name_or_path", "quantization_config"):
        if hasattr(config, name):
            delattr(config, name)
    return model, tokenizer


def _open(source: Path) -> GGUFReader:
    check_header(source)
    try:
        file = GGUFReader(source)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError, RecursionError, MemoryError) as error:
        raise LlavaError(f"{source}: no GGUF file that can be read ({first_line(error)})") from error
    architecture = _field(file, "general.architecture")
    if architecture != ARCHITECTURE:
        raise LlavaError(
            f"{source}: a GGUF file of architecture {architecture!r}; only {ARCHITECTURE!r} can be imported"
        )
    experts = _field(file, f"{ARCHITECTURE}.expert_count")
    if experts:
        raise LlavaError(f"{source}: a mixture of {experts} experts; only models without can be imported")
    return file


def _field(file: GGUFReader, name: str) -> Any:
    """A metadata field's value; None where there is none."""
    field = file.get_field(name)
    return None if field is None else field.contents()


def _own_dtype(file: GGUFReader) -> torch.dtype:
    """The widest of the matrices' types; float32 if any of them is quantized."""
    kinds = {tensor.tensor_type for tensor in file.tensors if len(tensor.shape) > 1}
    if len(kinds) == 1 and kinds <= _PLAIN.keys():
        return _PLAIN[kinds.pop()]
    return torch.float32


def _rope(file: GGUFReader, source: Path) -> dict[str, Any] | None:
    """How positions are scaled; None if they aren't.

    LLaMA-3.1's scaling is stored as a factor per frequency; what gives just these factors is found again.
    """
    factors = next((tensor.data for tensor in file.tensors if tensor.name == ROPE_FREQS), None)
    if factors is None:
        # As llama.cpp reads them: files of 2023 name no kind, and have the factor under another name.
        kind = _field(file, f"{ARCHITECTURE}.rope.scaling.type") or "linear"
        fields = (_field(file, f"{ARCHITECTURE}.rope.{name}") for name in ("scaling.factor", "scale_linear"))
        factor = float(next((value for value in fields if value is not None), 0) or 1)
        if kind == "none" or (kind == "linear" and factor == 1):
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        raise LlavaError(f"{source}: positions are scaled in the way {kind!r}, which can't be imported")
    theta = float(_field(file, f"{ARCHITECTURE}.rope.freq_base") or 10000.0)
    heads, size = (_field(file, f"{ARCHITECTURE}.{name}") for name in ("attention.head_count", "embedding_length"))
    width = _field(file, f"{ARCHITECTURE}.rope.dimension_count") or size // heads
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": round(float(np.max(factors)), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _LLAMA_3_POSITIONS,
    }
    sketch = LlamaConfig(head_dim=width, rope_parameters=rope, max_position_embeddings=16 * _LLAMA_3_POSITIONS)
    expected = rope_factors(sketch)
    if len(factors) != len(expected) or not np.allclose(expected.numpy(), factors, rtol=1e-4):
        raise LlavaError(f"{source}: {ROPE_FREQS} aren't the factors of LLaMA-3.1's scaling, so they can't be imported")
    return rope


@contextmanager
def _alone(source: Path) -> Iterator[Path]:
    """A folder with the file alone, as model.gguf: the library would read a tokenizer.json or an adapter's
    configuration that lies next to it in place of what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _NAME).symlink_to(source.resolve())
        yield Path(folder)


def _read_model(place: Path, source: Path, dtype: torch.dtype) -> Any:
    with library_errors(f"{source}: the weights can't be read"):
        return AutoModelForCausalLM.from_pretrained(place, gguf_file=_NAME, dtype=dtype)


def _check_blocks(file: GGUFReader, source: Path) -> None:
    """The library makes as many blocks as the header asks for, before it looks for their tensors."""
    blocks = _field(file, f"{ARCHITECTURE}.block_count")
    found = len({tensor.name.split(".")[1] for tensor in file.tensors if tensor.name.startswith("blk.")})
    if blocks != found:
        raise LlavaError(f"{source}: block_count is {blocks}, but there are tensors of {found} blocks")


def _check_tensors(file: GGUFReader, model: Any, source: Path) -> None:
    """The library's reader leaves out tensors that it knows no place for, and fills missing ones at random."""
    wanted = set(model.state_dict())
    tied = model.config.tie_word_embeddings
    names = language_names(model.config.num_hidden_layers)
    present = {tensor.name for tensor in file.tensors} - {ROPE_FREQS}
    unknown = sorted(present - names.keys())
    missing = sorted(wanted - {names.get(name) for name in present} - ({HEAD} if tied else set()))
    if unknown or missing:
        found = [f"{len(unknown)} tensors without a place (first {unknown[0]})"] if unknown else []
        found += [f"{len(missing)} missing (first {missing[0]})"] if missing else []
        raise LlavaError(f"{source}: {' and '.join(found)}; it can't be imported as it is")


def _read_tokenizer(place: Path, source: Path, file: GGUFReader) -> PreTrainedTokenizerBase:
    """The file's tokenizer, every token at its place.

    Raises:
        LlavaError: the file has none, or one whose ids would differ.
    """
    tokens, kinds = _field(file, "tokenizer.ggml.tokens"), _field(file, "tokenizer.ggml.token_type")
    if not tokens:
        raise LlavaError(f"{source}: holds no vocabulary; it isn't a whole language model")
    roles = {key: _field(file, f"tokenizer.ggml.{key}") for key in (*_ROLES.values(), *_ENDS)}
    for key, index in roles.items():
        if index is not None and not 0 <= index < len(tokens):
            raise LlavaError(f"{source}: tokenizer.ggml.{key} is {index}, but there are {len(tokens)} tokens")
    with library_errors(f"{source}: the tokenizer can't be read"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(place, gguf_file=_NAME)
    backend = tokenizer.backend_tokenizer
    pre = _field(file, "tokenizer.ggml.pre")
    if pre in DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif _field(file, "tokenizer.ggml.model") == "gpt2" and pre not in _GPT2_CUTS and pre not in known_cuts():
        log.warning("%s: its way of cutting text (tokenizer.ggml.pre %r) isn't known; GPT-2's is taken", source, pre)
    wrong = [index for index, token in enumerate(tokens) if tokenizer.convert_ids_to_tokens(index) != token]
    # What is no token of the alphabet is never made from text: the library leaves such names out.
    wrong = [index for index in wrong if kinds is None or kinds[index] in (_NORMAL, _CONTROL)]
    if wrong or len(tokenizer) > len(tokens):
        first = f" (first {tokens[wrong[0]]!r}, id {wrong[0]})" if wrong else ""
        raise LlavaError(f"{source}: {len(wrong)} of {len(tokens)} tokens would get other ids{first}")
    for role, key in _ROLES.items():
        setattr(tokenizer, f"{role}_token", None if roles[key] is None else tokens[roles[key]])
    tokenizer.model_max_length = int(_field(file, f"{ARCHITECTURE}.context_length"))
    tokenizer.padding_side = "right"
    return tokenizer


def _special_ids(file: GGUFReader) -> dict[str, Any]:
    """What a configuration says of special tokens; the unknown one isn't among them."""
    return {f"{role}_token_id": _field(file, f"tokenizer.ggml.{key}") for role, key in _ROLES.items() if role != "unk"}


def _end_ids(file: GGUFReader) -> int | list[int] | None:
    """All ids that end an answer: of the text, of a turn, of a message."""
    found = [_field(file, f"tokenizer.ggml.{name}") for name in _ENDS]
    ids = list(dict.fromkeys(index for index in found if index is not None))
    return ids[0] if len(ids) == 1 else ids or None
