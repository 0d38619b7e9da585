"""Any checkpoint as one whole folder in LLaVA's layout: safetensors, adapter merged, projector and tower inside."""

import shutil
from pathlib import Path

import torch

from llava.folders import check_space, check_target, stage
from llava.model.checkpoint.resolved import resolve_checkpoint
from llava.model.convert.model_card import write_model_card
from llava.model.convert.other_files import find_generation_config
from llava.model.families import EMBEDDING, model_class_of
from llava.model.loader import add_missing_image_tokens, load_image_processor
from llava.model.tokenizer import load_tokenizer_of, save_tokenizer
from llava.model.weights.shards import MAX_SHARD_BYTES, RESUMABLE, write_shards


def write_native(
    model_path: str | Path,
    output: str | Path,
    model_base: str | Path | None = None,
    *,
    description: str,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the model that `load_pretrained_model(model_path, model_base)` would load; returns the folder.

    Args:
        description: for the model card.
        dtype: cast all weights; by default each keeps its own, a merged one that of the base.

    Raises:
        LlavaError: `resolve_checkpoint`'s, no space, an output folder with something in it.
    """
    output = check_target(output, overwrite)
    checkpoint = resolve_checkpoint(model_path, model_base, vision_tower)
    config, folders = checkpoint.config, checkpoint.parts.folders
    tokenizer = load_tokenizer_of(folders, folders[0])
    add_missing_image_tokens(tokenizer, config, checkpoint.folder)
    processor = load_image_processor([*folders, checkpoint.parts.tower_folder], checkpoint.model)
    tensors = [checkpoint.planned(name, dtype=dtype) for name in checkpoint.names]
    check_space(output, sum(tensor.nbytes for tensor in tensors))
    config.architectures = [model_class_of(config).__name__]
    config.dtype = dtype or checkpoint.dtype(EMBEDDING)
    with stage(output, overwrite=overwrite, resume=RESUMABLE) as folder:
        write_shards(folder, tensors, checkpoint.files, max_shard_bytes=max_shard_bytes)
        config.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        processor.save_pretrained(folder)
        generation = find_generation_config(folders)
        if generation is not None:
            shutil.copyfile(generation, folder / generation.name)
        write_model_card(folder, description, base=str(model_base) if model_base else None, source=str(model_path))
    return output
