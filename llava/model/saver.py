"""Writing a checkpoint folder: weights as safetensors, config, tokenizer, image processor; whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from llava.folders import WEIGHTS, stage_files
from llava.model.language_model import LlavaForCausalLM
from llava.model.tokenizer import save_tokenizer
from llava.model.weights.assemble import tied_weights


def save_model(
    output_dir: str | Path,
    model: LlavaForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: Any = None,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write everything that `load_pretrained_model` needs into `output_dir`, the tower included.

    Nothing appears there before all is written, and `config.json` comes last: before it nothing can be loaded.
    Weight files of an earlier save are removed, other files stay. `state_dict` is for sharded training, where the
    model itself doesn't hold whole tensors.

    Raises:
        LlavaError: the folder can't be written to, or another process is writing to it.
    """
    with stage_files(output_dir, last="config.json", stale=WEIGHTS) as folder:
        if not getattr(model, "is_quantized", False):
            state_dict = (state_dict or model.state_dict()) | model.get_vision_tower().unused_layer_weights()
            # A gathered state holds copies, which nothing but their names tells from weights of their own.
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied_weights(model)}
        # Names as the model has them: the library's older ones for vision models differ.
        with _without_bar():
            model.save_pretrained(
                folder, state_dict=state_dict, max_shard_size=max_shard_size, save_original_format=False
            )
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Within, the library draws no bar: that of its files, mostly one, would tear the training's own apart."""
    draws = library_logging.is_progress_bar_enabled()
    if draws:
        library_logging.disable_progress_bar()
    try:
        yield
    finally:
        if draws:
            library_logging.enable_progress_bar()
