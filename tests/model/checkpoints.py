"""Checkpoints of every released layout, written from one tiny LLaVA, so that loading has to give it back."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import IMAGE_SIZE, make_llava

TOWER = "model.vision_tower."
PROJECTOR = "model.mm_projector."
OUR_FIELDS = ("mm_vision_config", "mm_image_token_scheme", "conversation_template", "rope_parameters", "dtype")


class Tiny:
    """A LLaVA in `root/llava`, its tensors and config, and its base models in `root/llm` and `root/clip`."""

    def __init__(self, root: Path, kind: str = "llama", **fields):
        self.root = root
        self.folder = make_llava(root, kind, **fields)
        self.clip, self.llm = root / "clip", root / "llm"
        self.tensors = load_file(self.folder / "model.safetensors")
        self.config = json.loads((self.folder / "config.json").read_text())

    def reference_config(self, **changes) -> dict:
        """The config as the reference's code writes it: without the fields that are ours."""
        config = {name: value for name, value in self.config.items() if name not in OUR_FIELDS}
        config["mm_vision_tower"] = str(self.clip)
        return config | changes

    def without(self, *prefixes: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(prefixes)}

    def only(self, *prefixes: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefixes)}

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.folder, folder)
        return folder


def write(
    folder: Path, tensors: dict | None, config: dict | None, tokenizer_of: Path | None = None, name="model.safetensors"
):
    """A checkpoint folder of the given parts."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        save(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer_of.glob("*token*") if tokenizer_of else ():
        shutil.copy(path, folder)
    return folder


def save(tensors: dict, path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def sample(patches: int = (IMAGE_SIZE // 14) ** 2) -> dict[str, torch.Tensor]:
    """One sample with one image."""
    pixel_values = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))
    return {"input_ids": torch.tensor([[1, 300] + [-200] * patches + [301, 302]]), "pixel_values": pixel_values}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**sample(model.num_patches)).logits


class Payload:
    """Unpickling this leaves a file behind: proof that code was run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
