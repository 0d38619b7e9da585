"""The small released models of scripts/fetch_small_models.sh, or a skip that says how to get them."""

import os
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture(scope="session")
def small_models() -> Path:
    """The folder with `smollm2-135m` and `dinov2-small`."""
    folder = Path(os.environ.get("LLAVA_SMALL_MODELS", ROOT / "models"))
    for name in ("smollm2-135m", "dinov2-small"):
        if not (folder / name / "config.json").is_file():
            pytest.skip(f"no {name} in {folder}; run scripts/fetch_small_models.sh, or set LLAVA_SMALL_MODELS")
    return folder


@pytest.fixture(scope="session")
def llava(small_models, tmp_path_factory) -> Path:
    """A LLaVA of the two with a random projector, whose features are as large as embeddings."""
    from llava.model import build_model_from_llm, save_model

    torch.manual_seed(0)
    tokenizer, model, processor, _ = build_model_from_llm(
        small_models / "smollm2-135m",
        small_models / "dinov2-small",
        device="cpu",
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-1,
        image_aspect_ratio="pad",
        conversation_template="smollm2",
    )
    with torch.no_grad():
        model.model.mm_projector[2].weight.mul_(0.3)
        model.model.mm_projector[2].bias.zero_()
    folder = tmp_path_factory.mktemp("real") / "llava"
    save_model(folder, model, tokenizer, processor)
    return folder
