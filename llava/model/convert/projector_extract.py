"""The projector of a checkpoint as a file of its own, with the rows of the image tokens where they were trained."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava.constants import SCHEME_PATCH
from llava.errors import LlavaError
from llava.folders import expanded, stage_files
from llava.model.checkpoint.adapter import non_lora_file
from llava.model.checkpoint.hf_layout import check_identity, is_hf_config, native_config, native_name
from llava.model.checkpoint.layouts import projector_file
from llava.model.convert.model_card import write_model_card
from llava.model.convert.other_files import copy_side_files
from llava.model.families import EMBEDDING
from llava.model.tokenizer import find_tokenizer, load_tokenizer
from llava.model.weights.files import WeightFiles, find_weight_files
from llava.model.weights.locate import locate_model
from llava.records import atomic_path, read_json
from llava.tokenization import ImageTokens

FILE_NAME = "mm_projector.bin"
_OTHER_FILES = {".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".json"}
"""What a file's name ends in that isn't written; a folder's name may hold dots."""

_PROJECTOR = re.compile(r"(?:.*\.)?(mm_projector\..+)")


def extract_projector(model_path: str | Path, output: str | Path, *, overwrite: bool = True) -> tuple[Path, list[str]]:
    """Write `model.mm_projector.*` of a checkpoint; returns the file and the names in it.

    Where images stand between <im_start> and <im_end>, the embedding's rows of the image tokens go along: they
    were trained together. Only these tensors are read.

    Args:
        output: a `.bin` or `.safetensors` file, or a folder, which then also gets the configuration and loads over
            its language model (`load_pretrained_model(folder, model_base)`).

    Raises:
        LlavaError: no projector in the checkpoint, or a file is there that may not be replaced (in a folder also one of
            another configuration or tokenizer).
    """
    folder, output = locate_model(model_path), expanded(output)
    is_file = output.suffix in {".bin", ".safetensors"}
    if not is_file and output.suffix in _OTHER_FILES and not output.is_dir():
        raise LlavaError(f"--output {output}: give a .bin or .safetensors file, or a folder")
    if not is_file and output.resolve() == folder.resolve():
        raise LlavaError(
            f"--output {output}: the checkpoint itself; give another folder, or a .bin or .safetensors file"
        )
    path = output if is_file else output / FILE_NAME
    if path.exists() and not overwrite:
        raise LlavaError(f"{path} is there already; give another name, or --overwrite to replace it")
    tensors = _projector(folder) | _image_rows(folder)
    if is_file:
        _write(path, tensors)
        return path, list(tensors)
    with stage_files(output, last=FILE_NAME, overwrite=overwrite) as staged:
        _write(staged / FILE_NAME, tensors)
        copy_side_files(folder, staged)
        write_model_card(
            staged,
            "The projector of a LLaVA alone: load it over its language model (`--model-base`).",
            source=str(model_path),
        )
    return path, list(tensors)


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic_path(path) as temporary:
        if path.suffix == ".bin":
            torch.save(tensors, temporary)
        else:
            save_file(tensors, temporary, metadata={"format": "pt"})


def _projector(folder: Path) -> dict[str, torch.Tensor]:
    files = find_weight_files(folder)
    own_file = non_lora_file(folder) or projector_file(folder)
    if not files and own_file is not None:
        files = [own_file]
    if not files:
        raise LlavaError(f"{folder}: no weights found; give the folder of a LLaVA checkpoint")
    weights = WeightFiles(files)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    found = {}
    if is_hf_config(config):
        linear = native_config(folder).mm_projector_type == "linear"
        for hf_name in weights:
            if "multi_modal_projector." in hf_name:
                name = native_name(hf_name, linear)
                if name is None:
                    check_identity(weights, hf_name)
                else:
                    found[name] = weights.read(hf_name).clone()
    else:
        for name in weights:
            if match := _PROJECTOR.fullmatch(name):
                found[f"model.{match[1]}"] = weights.read(name).clone()
    if not found:
        raise LlavaError(
            f"{weights.files[0].parent}: no tensor of a projector (mm_projector.*) among {len(weights)}; is this a "
            f"plain language model?"
        )
    return found


def _image_rows(folder: Path) -> dict[str, torch.Tensor]:
    """The last rows of the embedding, if they are those of the image tokens."""
    path = folder / "config.json"
    if not path.is_file() or not find_weight_files(folder) or not find_tokenizer(folder):
        return {}
    config = read_json(path)
    if is_hf_config(config) or not config.get("mm_use_im_start_end"):
        return {}
    tokenizer = load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    ids = sorted(vocabulary[token] for token in ImageTokens(SCHEME_PATCH, True).needed if token in vocabulary)
    weights = WeightFiles.of_folder(folder)
    rows = weights.shape(EMBEDDING)[0]
    if not ids or ids != list(range(rows - len(ids), rows)):
        raise LlavaError(
            f"{folder}: the image tokens (ids {ids}) aren't the last of the embedding's {rows} rows, so their rows "
            f"can't go with the projector; the tokenizer belongs to another model"
        )
    return {EMBEDDING: weights.read(EMBEDDING)[ids[0] :].clone()}
