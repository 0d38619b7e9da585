"""Any checkpoint as one whole folder in LLaVA's layout: safetensors, adapter merged, projector and tower inside."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.errors import LlavaError
from llava.folders import check_space, check_target, stage
from llava.model.checkpoint.resolved import ResolvedCheckpoint, resolve_checkpoint
from llava.model.convert.model_card import write_model_card
from llava.model.convert.other_files import find_generation_config
from llava.model.families import EMBEDDING, model_class_of
from llava.model.loader import add_missing_image_tokens, load_image_processor
from llava.model.tokenizer import load_tokenizer_of, save_tokenizer
from llava.model.weights.shards import MAX_SHARD_BYTES, RESUMABLE, Fill, Planned, write_shards


def write_native(
    model_path: str | Path,
    output: str | Path,
    model_base: str | Path | None = None,
    *,
    description: str,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | None = None,
    averaged_with: Sequence[str | Path] = (),
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the model that `load_pretrained_model(model_path, model_base)` would load; returns the folder.

    Args:
        description: for the model card.
        dtype: cast all weights; by default each keeps its own, a merged one that of the base.
        averaged_with: more checkpoints: of each weight the mean over all is written, summed in float32.

    Raises:
        LlavaError: `resolve_checkpoint`'s, no space, an output folder with something in it, checkpoints to be averaged
            whose weights or tokens differ.
    """
    output = check_target(output, overwrite)
    checkpoint = resolve_checkpoint(model_path, model_base, vision_tower)
    others = [resolve_checkpoint(path) for path in averaged_with]
    config, folders = checkpoint.config, checkpoint.parts.folders
    tokenizer = load_tokenizer_of(folders, folders[0])
    add_missing_image_tokens(tokenizer, config, checkpoint.folder)
    processor = load_image_processor([*folders, checkpoint.parts.tower_folder], checkpoint.model)
    for other in others:
        _check_alike(checkpoint, other)
    tensors = [_planned_mean([checkpoint, *others], name, dtype) for name in checkpoint.names]
    check_space(output, sum(tensor.nbytes for tensor in tensors))
    config.architectures = [model_class_of(config).__name__]
    config.dtype = dtype or checkpoint.dtype(EMBEDDING)
    with stage(output, overwrite=overwrite, resume=RESUMABLE) as folder:
        files = [path for one in (checkpoint, *others) for path in one.files]
        write_shards(folder, tensors, files, max_shard_bytes=max_shard_bytes)
        config.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        processor.save_pretrained(folder)
        generation = find_generation_config(folders)
        if generation is not None:
            shutil.copyfile(generation, folder / generation.name)
        write_model_card(
            folder,
            description,
            base=str(model_base) if model_base else None,
            source=", ".join(map(str, (model_path, *averaged_with))),
        )
    return output


def _planned_mean(checkpoints: Sequence[ResolvedCheckpoint], name: str, dtype: torch.dtype | None) -> Planned:
    planned = checkpoints[0].planned(name, dtype=dtype)
    if len(checkpoints) == 1 or not checkpoints[0].dtype(name).is_floating_point:
        return planned

    def begin() -> Fill:
        flat = [one.read(name).detach().reshape(-1) for one in checkpoints]

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            total = flat[0][start:stop].to(torch.float32, copy=True)
            for more in flat[1:]:
                total += more[start:stop]
            out.copy_(total / len(flat))

        return fill

    return Planned(name, planned.shape, planned.dtype, begin)


def _check_alike(first: ResolvedCheckpoint, other: ResolvedCheckpoint) -> None:
    """The same weights in the same shapes, and a tokenizer with the same ids: else a mean would be of nothing."""
    for name in first.names.keys() | other.names.keys():
        shapes = [one.shape(name) if name in one.names else "missing" for one in (first, other)]
        if shapes[0] != shapes[1]:
            raise LlavaError(
                f"{other.folder}: {name} is {shapes[1]}, and {shapes[0]} in {first.folder}; only checkpoints of one "
                "model, trained in different ways, have a mean"
            )
    vocabularies = [load_tokenizer_of(one.parts.folders, one.parts.folders[0]).get_vocab() for one in (first, other)]
    if vocabularies[0] != vocabularies[1]:
        raise LlavaError(
            f"{other.folder}: its tokens are not those of {first.folder}; only checkpoints of one model have a mean"
        )
