"""What a worker tells of its model: the facts that the checkpoint holds, in words."""

from llava.errors import amount
from llava.folders import expanded
from llava.model.convert.model_card import shown_name
from llava.model.language_model import LlavaForCausalLM
from llava.records import read_json
from llava.serve.request_models import ModelCard

MOST = 500
"""Characters of a line."""


def card_of(model_path: str, model: LlavaForCausalLM) -> ModelCard:
    """From the model's configuration and, where the checkpoint is a folder that holds one, `training_summary.json`."""
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    tower = getattr(config, "mm_vision_config", None) or {}
    lines = {
        "language_model": f"{config.model_type}, {config.num_hidden_layers} layers, {_rounded(count)} parameters with "
        f"the tower, {str(model.dtype).removeprefix('torch.')}",
        "tower": _tower(getattr(config, "mm_vision_tower", None), tower),
        "template": config.conversation_template,
        "context": f"{config.max_position_embeddings:,} tokens",
        "trained_on": getattr(config, "trained_on", None),
    }
    file = expanded(model_path) / "training_summary.json"
    summary = read_json(file) if file.is_file() else {}
    if base := summary.get("base"):
        lines["base"] = shown_name(base)
    if summary.get("steps") and summary.get("samples"):
        lines["training"] = f"{amount(summary['steps'], 'step')} over {amount(summary['samples'], 'sample')}"
    return ModelCard(**{name: None if line is None else str(line)[:MOST] for name, line in lines.items()})


def _tower(name: str | None, config: dict) -> str | None:
    if name is None:
        return None
    size, patch = config.get("image_size"), config.get("patch_size")
    return shown_name(name) + (f", {size} × {size} pixels in patches of {patch}" if size and patch else "")


def _rounded(count: int) -> str:
    for unit, words in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= unit:
            return f"{count / unit:.3g} {words}"
    return str(count)
