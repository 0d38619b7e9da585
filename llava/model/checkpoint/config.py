"""config.json of a native checkpoint, whatever year it is from: missing fields inferred from what is there."""

import logging
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_PATCH_TOKEN, SCHEME_PATCH, SCHEME_PLACEHOLDER
from llava.errors import LlavaError, library_errors
from llava.model.configuration import LlavaConfigFields
from llava.model.families import family_names, family_of, find_family
from llava.records import read_json

log = logging.getLogger(__name__)

STAGE_1_TEMPLATE = "plain"
V1_0_ASKED, V1_0_TRAINED = "simple", "v0"
"""Templates of LLaVA-Med v1.0: its releases were evaluated with one and trained with another."""

_FIELDS_SINCE_PLACEHOLDER = ("mm_projector_type", "mm_use_im_patch_token", "mm_vision_select_feature")
"""Fields that came with the one-placeholder scheme; a v1.0 config has none of them."""


def read_config(folder: Path) -> LlavaConfigFields:
    """The configuration of a native LLaVA folder (also of a LoRA or projector folder that has one).

    Raises:
        LlavaError: not the configuration of a language model of any family.
    """
    path = folder / "config.json"
    content = read_json(path)
    if not isinstance(content, dict) or "hidden_size" not in content:
        raise LlavaError(f"{path}: not the configuration of a language model")
    config_class = _config_class(content, path)
    if content.get("mm_image_token_scheme") is None:
        content["mm_image_token_scheme"] = _scheme(content, folder)
    # None stands in old files for "as usual".
    content = {name: value for name, value in content.items() if value is not None or not name.startswith("mm_")}
    with library_errors(f"{path}: a field of it can't be"):
        config = config_class.from_dict(content | {"model_type": config_class.model_type})
    if config.conversation_template is None and (config.mm_vision_tower or config.mm_vision_config):
        infer_template(config, folder)
    return config


def infer_template(config: LlavaConfigFields, folder: Path) -> None:
    """Set the prompt template that a release of this layout is asked with."""
    family = family_of(config)
    known = V1_0_ASKED if config.mm_image_token_scheme == SCHEME_PATCH else None
    known = known or family.recognise_template(config, _chat_template(folder))
    config.conversation_template = known or family.default_template
    log.info("%s names no conversation_template; %s, by its layout", folder, config.conversation_template)


def training_template(config: Any, folder: Path) -> str:
    """The template of a training run from `folder` without `--version`."""
    return template_for_training(config, _chat_template(folder))


def template_for_training(config: Any, chat_template: str | None) -> str:
    """The checkpoint's own, but stage 1's, and v1.0's for the one that it is asked with; else that of `chat_template`
    where it is known; else the family's."""
    own = getattr(config, "conversation_template", None)
    if own == V1_0_ASKED and config.mm_image_token_scheme == SCHEME_PATCH:
        return V1_0_TRAINED
    if own and own != STAGE_1_TEMPLATE:
        return own
    family = family_of(config)
    return family.recognise_chat(chat_template or "") or family.training_template


def _config_class(content: dict[str, Any], path: Path):
    model_type = content.get("model_type")
    family = find_family(model_type)
    if family is None:
        raise LlavaError(f"{path}: model_type {model_type!r} isn't supported; use a LLaVA over {family_names()}")
    return family.config_class


def _scheme(content: dict[str, Any], folder: Path) -> str:
    """v1.0's runs of <im_patch>, if the vocabulary has that token and the config none of the later fields."""
    if content.get("model_type") != "llava" or any(name in content for name in _FIELDS_SINCE_PLACEHOLDER):
        return SCHEME_PLACEHOLDER
    has_token = any(
        DEFAULT_IMAGE_PATCH_TOKEN in _text(folder / name) for name in ("added_tokens.json", "tokenizer.json")
    )
    return SCHEME_PATCH if has_token else SCHEME_PLACEHOLDER


def _chat_template(folder: Path) -> str:
    jinja = _text(folder / "chat_template.jinja")
    if jinja or not (folder / "tokenizer_config.json").is_file():
        return jinja
    return str(read_json(folder / "tokenizer_config.json").get("chat_template") or "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
