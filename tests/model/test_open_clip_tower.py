"""BiomedCLIP's kind of tower: refused with the name of the extra where open_clip is missing, else run in a process.

open_clip wants torchvision, whose wheel for a CPU build of torch can't be imported beside transformers. So
`make test` puts both into a folder of their own (`<environment>/openclip`, or LLAVA_OPENCLIP_DIR), and the cases in
open_clip_cases.py run in a process that sees it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.errors import LlavaError
from llava.model import build_model_from_llm
from llava.model.towers import read_vision_config
from tests.model.checkpoints import save
from tests.tiny import make_llm

CASES = Path(__file__).with_name("open_clip_cases.py")
FOLDER = Path(os.environ.get("LLAVA_OPENCLIP_DIR", Path(sys.prefix) / "openclip"))


def write_config(folder, **vision):
    folder.mkdir(exist_ok=True)
    content = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": vision},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.2] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def test_trained_and_loaded_end_to_end():
    if not FOLDER.is_dir() and importlib.util.find_spec("open_clip") is None:
        pytest.skip(f"open_clip is not installed (neither here nor in {FOLDER})")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["LLAVA_OPENCLIP_DIR"] = str(FOLDER)
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


def test_error_names_the_extra(tmp_path, monkeypatch):
    for name in ("open_clip", "open_clip.timm_model"):
        monkeypatch.setitem(sys.modules, name, None)
    tower = write_config(tmp_path / "tower", timm_model_name="vit_base_patch16_224")
    with pytest.raises(LlavaError, match=r'needs the package "open_clip".*pip install "llava-med\[openclip\]"'):
        build_model_from_llm(make_llm(tmp_path / "llm"), tower, device="cpu")


def test_config_that_is_kept(tmp_path):
    folder = write_config(tmp_path, timm_model_name="vit_base_patch16_224", image_size=224, timm_proj="linear")
    assert read_vision_config(folder) == {
        "model_type": "open_clip",
        "timm_model_name": "vit_base_patch16_224",
        "image_size": 224,
        "image_mean": [0.5] * 3,
        "image_std": [0.2] * 3,
    }


def test_open_clip_model_without_a_timm_trunk(tmp_path):
    folder = write_config(tmp_path, layers=12, width=768, patch_size=16)
    save({"visual.conv1.weight": torch.ones(1)}, folder / "open_clip_model.safetensors")
    with pytest.raises(LlavaError, match=r"open_clip_config\.json: only open_clip models with a timm ViT"):
        read_vision_config(folder)
