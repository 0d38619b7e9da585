"""From transformers' `LlavaForConditionalGeneration` back to LLaVA's own layout, every tensor exact."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError
from llava.folders import check_space, check_target, stage
from llava.images import ImageProcessor
from llava.model.checkpoint.hf_layout import check_identity, is_hf_config, native_config, native_name
from llava.model.configuration import LlavaConfigFields
from llava.model.convert.hf_writer import EXPORT_NOTE, PAD_TOKEN
from llava.model.convert.model_card import write_model_card
from llava.model.families import EMBEDDING, EMBEDDINGS, HEAD, model_class_of
from llava.model.tokenizer import load_tokenizer, save_tokenizer
from llava.model.towers import CLIP, VisionTower, sketch_vision_tower
from llava.model.weights.files import WeightFiles, is_harmless
from llava.model.weights.locate import locate_model
from llava.model.weights.shards import MAX_SHARD_BYTES, RESUMABLE, Fill, Planned, fill_from, planned_copy, write_shards
from llava.records import read_json, write_json

log = logging.getLogger(__name__)

_CLIP_LARGE: dict[tuple[Any, Any], str] = {
    (1024, 224): "openai/clip-vit-large-patch14",
    (1024, 336): "openai/clip-vit-large-patch14-336",
}


def import_hf(
    model_path: str | Path, output: str | Path, *, overwrite: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write a `LlavaForConditionalGeneration` folder or hub id in LLaVA's layout, without the added vocabulary.

    Raises:
        LlavaError: another layout, a tensor without a counterpart, an embedding that is too small.
    """
    output = check_target(output, overwrite)
    source = locate_model(model_path)
    content = read_json(source / "config.json")
    if not is_hf_config(content):
        raise LlavaError(
            f"{source}: config.json has no text_config and vision_config, so this isn't transformers' LLaVA layout; "
            f"a native checkpoint needs no import"
        )
    config = native_config(source)
    note = content.get(EXPORT_NOTE) or {}
    rows = note.get("vocab_size") or content.get("image_token_index") or content.get("image_token_id")
    if not isinstance(rows, int) or rows < 1:
        raise LlavaError(f"{source / 'config.json'}: has no image_token_index, so the vocabulary's size is unknown")
    processor = ImageProcessor.find(source)
    if processor is None:
        raise LlavaError(
            f"{source}: no preprocessor_config.json or processor_config.json; copy it from the model's source"
        )
    weights = WeightFiles.of_folder(source)
    tensors = _plan(weights, rows, config)
    tokenizer = load_tokenizer(source)
    if not note:
        _check_cut(tokenizer, rows, source)
    check_space(output, sum(tensor.nbytes for tensor in tensors))
    tokenizer = _without_added(tokenizer, note, rows)
    config.vocab_size = rows
    config.architectures = [model_class_of(config).__name__]
    config.pad_token_id = tokenizer.pad_token_id
    if config.mm_vision_tower is None:
        vision = config.mm_vision_config or {}
        if vision.get("model_type", CLIP) == CLIP:
            config.mm_vision_tower = _CLIP_LARGE.get((vision.get("hidden_size"), vision.get("image_size")))
        # The folder holds the tower: LLaVA's own code reads it only if it was trained.
        config.unfreeze_mm_vision_tower = True
    with stage(output, overwrite=overwrite, resume=RESUMABLE) as folder:
        write_shards(folder, tensors, weights.files, max_shard_bytes=max_shard_bytes)
        config.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        processor.save_pretrained(folder)
        if (source / "generation_config.json").is_file():
            settings = read_json(source / "generation_config.json")
            write_json(folder / "generation_config.json", settings | {"pad_token_id": tokenizer.pad_token_id})
        write_model_card(folder, "A checkpoint in LLaVA's own layout.", source=str(model_path))
    return output


def _plan(weights: WeightFiles, rows: int, config: LlavaConfigFields) -> list[Planned]:
    linear = config.mm_projector_type == "linear"
    tower = sketch_vision_tower(config)
    planned = []
    for hf_name in weights:
        name = native_name(hf_name, linear, tower)
        if is_harmless(name or hf_name):
            continue
        if name is None:
            if not (linear and re.search(r"multi_modal_projector\.linear_2\.", hf_name)):
                raise LlavaError(f"{weights.file_of(hf_name)}: {hf_name} has no counterpart in LLaVA's layout")
            check_identity(weights, hf_name)
        elif name == HEAD and config.tie_word_embeddings:
            _check_tied(weights, hf_name, tower)
        elif name in EMBEDDINGS:
            shape = weights.shape(hf_name)
            if shape[0] < rows:
                raise LlavaError(
                    f"{weights.file_of(hf_name)}: {hf_name} has {shape[0]} rows, fewer than the {rows} used"
                )
            planned.append(Planned(name, (rows, *shape[1:]), weights.dtype(hf_name), _Cut(weights, hf_name, rows)))
        else:
            planned.append(planned_copy(weights, hf_name, name))
    return planned


def _check_tied(weights: WeightFiles, head: str, tower: VisionTower) -> None:
    embedding = next((name for name in weights if native_name(name, tower=tower) == EMBEDDING), None)
    if embedding is None or not torch.equal(weights.read(head), weights.read(embedding)):
        raise LlavaError(
            f"{weights.file_of(head)}: {head} isn't the embedding, but config.json ties the two; set "
            f"tie_word_embeddings there to false"
        )


class _Cut:
    """The first rows of a tensor."""

    def __init__(self, weights: WeightFiles, name: str, rows: int):
        self.weights, self.name, self.rows = weights, name, rows

    def __call__(self) -> Fill:
        return fill_from(self.weights.read(self.name)[: self.rows])


def _check_cut(tokenizer: PreTrainedTokenizerBase, rows: int, source: Path) -> None:
    """Fail unless <image> and what it's padded with are all that lies behind the `rows` that are kept."""
    added = {DEFAULT_IMAGE_TOKEN, PAD_TOKEN, tokenizer.pad_token}
    lost = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    lost = [(number, token) for number, token in lost if token not in added]
    if lost:
        number, token = lost[0]
        raise LlavaError(
            f"{source}: {len(lost)} tokens come after <image> ({rows}) in the vocabulary (first {token!r}, {number}) "
            f"and would be lost; serve this folder as it is"
        )


def _without_added(tokenizer: PreTrainedTokenizerBase, note: dict[str, Any], rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer without <image> and <pad>: in LLaVA's layout neither is a token."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    drop = set(note.get("added_tokens", ()))
    kept = [token for token in backend["added_tokens"] if token["content"] not in drop and (note or token["id"] < rows)]
    if len(kept) == len(backend["added_tokens"]):
        return tokenizer
    gone = {token["content"] for token in backend["added_tokens"]} - {token["content"] for token in kept}
    backend["added_tokens"] = kept
    names = {
        role: token
        for role in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (token := getattr(tokenizer, role)) is not None and token not in gone
    }
    if note.get("pad_token"):
        names["pad_token"] = note["pad_token"]
    names.setdefault("pad_token", names.get("unk_token") or names.get("eos_token"))
    result = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        model_max_length=tokenizer.model_max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **names,
    )
    result.name_or_path = tokenizer.name_or_path
    return result
