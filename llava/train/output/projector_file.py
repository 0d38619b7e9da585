"""`mm_projector.bin`: the projector alone, as stage 1 leaves it and stage 2 may start from it."""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.errors import LlavaError, first_line
from llava.folders import expanded
from llava.model.language_model import LlavaForCausalLM
from llava.records import atomic_path

FILE_NAME = "mm_projector.bin"
_PROJECTOR = re.compile(r"(?:^|.*\.)mm_projector\.(.+)")
_EMBEDDING = re.compile(r"(?:^|.*\.)embed_tokens\.weight")


def save_projector(path: Path, tensors: dict[str, torch.Tensor], token_ids: Sequence[int] = ()) -> None:
    """Write the projector's tensors of a model's state under their names there (`model.mm_projector.*`).

    `token_ids` (of <im_start>, <im_end>) adds their rows of the input embedding, which stage 1 trains too.
    """
    content = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items() if _PROJECTOR.match(name)}
    if token_ids:
        name = next(name for name in tensors if _EMBEDDING.match(name))
        content[name] = tensors[name][list(token_ids)].detach().to("cpu", copy=True)
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_projector(model: LlavaForCausalLM, path: str | Path, token_ids: Sequence[int] = ()) -> None:
    """Give the model the projector of a `mm_projector.bin`, or of a folder that holds one.

    Where the file has embeddings too, those of `token_ids` are taken from it.

    Raises:
        LlavaError: not such a file, or made for another projector.
    """
    path = expanded(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise LlavaError(f"--pretrain_mm_mlp_adapter {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise LlavaError(f"{path}: not a file of tensors ({first_line(error)})") from error
    found = {match[1]: tensor for name, tensor in content.items() if (match := _PROJECTOR.match(name))}
    projector = model.get_model().mm_projector
    own = projector.state_dict()
    if {name: tensor.shape for name, tensor in found.items()} != {n: t.shape for n, t in own.items()}:
        raise LlavaError(f"{path} holds another projector: {_shapes(found)}; the model's is {_shapes(own)}")
    projector.load_state_dict(found)
    rows = next((tensor for name, tensor in content.items() if _EMBEDDING.match(name)), None)
    if rows is not None and token_ids:
        _load_rows(model, rows, list(token_ids), path)


def _load_rows(model: LlavaForCausalLM, rows: torch.Tensor, token_ids: list[int], path: Path) -> None:
    """Embeddings of tokens: just theirs, or picked from the whole matrix, which LLaVA's own files hold."""
    weight = model.get_input_embeddings().weight
    if rows.shape[0] != len(token_ids):
        if rows.shape != weight.shape:
            raise LlavaError(
                f"{path}: embeddings of shape {list(rows.shape)} don't fit the model's {list(weight.shape)}; "
                "was --mm_use_im_start_end the same in stage 1?"
            )
        rows = rows[token_ids]
    with torch.no_grad():
        weight[token_ids] = rows.to(weight)


def _shapes(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()) or "none"
