"""Writing a checkpoint folder: weights as safetensors, config, tokenizer, image processor; whole or not at all."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava.model.tokenizer import save_tokenizer
from llava.model.weights.assemble import tied_weights


def save_model(
    output_dir: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: Any = None,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write everything that `load_pretrained_model` needs into `output_dir`, the tower included.

    Files are written beside it and moved in when all are complete; weight files of an earlier save there are
    removed. `state_dict` is for sharded training, where the model itself doesn't hold whole tensors.
    """
    output_dir = Path(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", suffix=".part", dir=output_dir.parent))
    try:
        if not getattr(model, "is_quantized", False):
            state_dict = (state_dict or model.state_dict()) | model.get_vision_tower().unused_layer_weights()
            # A gathered state holds copies, which nothing but their names tells from weights of their own.
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied_weights(model)}
        # Names as the model has them: the library's older ones for vision models differ.
        model.save_pretrained(
            temporary, state_dict=state_dict, max_shard_size=max_shard_size, save_original_format=False
        )
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        if image_processor is not None:
            image_processor.save_pretrained(temporary)
        _move_in(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_in(temporary: Path, output_dir: Path) -> None:
    output_dir.mkdir(exist_ok=True)
    new = {path.name for path in temporary.iterdir()}
    for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
        for stale in output_dir.glob(pattern):
            if stale.name not in new:
                stale.unlink()
    for path in sorted(temporary.iterdir()):
        path.replace(output_dir / path.name)
