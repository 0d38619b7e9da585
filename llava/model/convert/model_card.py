"""The README.md (model card) of a checkpoint folder: what it is, how it was made, what it is not for."""

from pathlib import Path
from typing import Any

from llava.constants import RESEARCH_NOTICE
from llava.folders import expanded, final_name
from llava.records import atomic_path, read_json

_FACTS = {
    "model_type": "Model type",
    "hidden_size": "Hidden size",
    "num_hidden_layers": "Layers",
    "vocab_size": "Vocabulary",
    "mm_vision_tower": "Vision tower",
    "mm_projector_type": "Projector",
    "mm_vision_select_layer": "Selected layer of the tower",
    "mm_image_token_scheme": "Image tokens",
    "image_aspect_ratio": "Image preprocessing",
    "conversation_template": "Prompt template",
}


def write_model_card(
    folder: Path,
    description: str,
    *,
    base: str | None = None,
    source: str | None = None,
    is_delta: bool = False,
    notes: tuple[str, ...] = (),
) -> None:
    """Write `folder`/README.md.

    Args:
        description: a sentence or two: what this folder holds.
        base, source: models that it was made from; of a local path only the last part is told.
        notes: further paragraphs.
    """
    from llava import __version__

    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    lines = ["---", "tags:", "- llava", "- medical", "- research-only"]
    lines += ["- delta-weights"] if is_delta else []
    is_adapter = (folder / "adapter_config.json").is_file()
    lines += ["- lora"] if is_adapter else []
    if (folder / "config.json").is_file() and not is_delta and not is_adapter:
        lines += ["pipeline_tag: image-text-to-text"]
    lines += ["---", "", f"# {final_name(folder)}", "", f"**{RESEARCH_NOTICE}**", "", description, ""]
    origin = [("Base", base), ("Made from", source)]
    facts = [(words, shown_name(value)) for words, value in origin if value]
    facts += [
        (words, str(_value(config, field))) for field, words in _FACTS.items() if _value(config, field) is not None
    ]
    facts.append(("Written by", f"llava-med {__version__}"))
    lines += ["| | |", "|---|---|", *(f"| {words} | {value} |" for words, value in facts), ""]
    for note in notes:
        lines += [note, ""]
    lines += [
        "Its users are bound by the licences of all it was made from: the language model's, the vision tower's, "
        "the training data's.",
    ]
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def shown_name(path: str) -> str:
    """A hub id as it is, of a folder its last part: a path would tell of the machine that it was on."""
    as_path = expanded(path)
    return as_path.name or str(as_path.absolute().name) if as_path.exists() or as_path.is_absolute() else path


def _value(config: dict[str, Any], field: str) -> Any:
    value = config.get(field, (config.get("text_config") or {}).get(field))
    return shown_name(value) if isinstance(value, str) and field == "mm_vision_tower" else value
