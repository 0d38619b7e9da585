"""A new LLaVA from a language model's folder and a vision tower's: where stage 1 starts."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_PATCH_TOKEN, SCHEME_PATCH
from llava.errors import LlavaError, library_errors
from llava.folders import expanded
from llava.model.checkpoint.layouts import model_weights
from llava.model.families import family_of_llm, model_class_of
from llava.model.language_model import LlavaForCausalLM
from llava.model.loader import LoadedModel, context_length, load_image_processor
from llava.model.tokenizer import add_tokens, load_tokenizer
from llava.model.towers import read_vision_config
from llava.model.weights.assemble import Source, build_empty, fill_model
from llava.model.weights.files import is_harmless
from llava.model.weights.locate import locate_model
from llava.model.weights.placement import usable_device
from llava.tokenization import ImageTokens


def build_model_from_llm(
    llm_path: str | Path,
    vision_tower: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    cache_dir: str | Path | None = None,
    **mm_fields: Any,
) -> LoadedModel:
    """A LLaVA of a language model and a vision tower (folders or hub ids) with a new projector.

    Args:
        cache_dir: where hub ids are downloaded to; by default the hub's cache.
        mm_fields: fields of the LLaVA config: `mm_projector_type`, `mm_vision_select_layer`,
            `mm_vision_select_feature`, `mm_image_token_scheme`, `mm_use_im_start_end`,
            `mm_use_im_patch_token`, `image_aspect_ratio`, `conversation_template`, …
            Image tokens that they ask for are added to tokenizer and embeddings.

    Raises:
        LlavaError: the language model is of another kind, a folder is incomplete.
    """
    llm_folder = locate_model(llm_path, "language model", cache_dir=cache_dir)
    tower_folder = locate_model(vision_tower, "vision tower", cache_dir=cache_dir)
    # A folder's absolute path, so that the note of its origin stays true from any working directory.
    tower_name = str(tower_folder.absolute()) if expanded(vision_tower).is_dir() else str(vision_tower)
    config = llava_config(llm_folder, tower_name, read_vision_config(tower_folder), mm_fields)
    model = build_empty(model_class_of(config), config, attn_implementation)
    weights = model_weights(llm_folder)
    names = {name: name for name in weights if not is_harmless(name)}
    sources = [Source("language model", weights, names), model.get_vision_tower().source(tower_folder)]
    fill_model(model, sources, dtype, usable_device(device), fresh=lambda name: "mm_projector" in name)
    tokenizer = load_tokenizer(llm_folder)
    add_image_tokens(model, tokenizer)
    processor = load_image_processor([tower_folder], model)
    return LoadedModel(tokenizer, model, processor, context_length(config))


def add_image_tokens(model: LlavaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the image tokens that the model's config asks for; returns how many were new.

    <im_patch> for `mm_use_im_patch_token` and the patch scheme, <im_start> and <im_end> for
    `mm_use_im_start_end`. New rows of both embedding matrices start as the mean of the old ones.
    """
    config = model.config
    tokens = ImageTokens.from_config(config).needed
    if config.mm_use_im_patch_token and DEFAULT_IMAGE_PATCH_TOKEN not in tokens:
        tokens = [DEFAULT_IMAGE_PATCH_TOKEN, *tokens]
    added = add_tokens(tokenizer, tokens, strip_blanks=config.mm_image_token_scheme == SCHEME_PATCH)
    resize_embeddings(model, len(tokenizer))
    return added


def resize_embeddings(model: LlavaForCausalLM, rows: int) -> None:
    """Give both embedding matrices at least `rows` rows; new ones are the mean of the old."""
    old_rows = model.get_input_embeddings().weight.shape[0]
    if rows <= old_rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = embeddings.weight
            weight[old_rows:] = weight[:old_rows].float().mean(dim=0, keepdim=True).to(weight.dtype)


def llava_config(llm_folder: Path, tower_name: str, vision_config: dict, mm_fields: dict[str, Any]):
    """The configuration of a new LLaVA: the language model's own, the tower's, and fields of `build_model_from_llm`."""
    with library_errors(f"{llm_folder}: config.json can't be read"):
        llm_config = AutoConfig.from_pretrained(llm_folder, trust_remote_code=False)
    config_class = family_of_llm(llm_config.model_type, llm_folder).config_class
    fields = llm_config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    known = config_class.from_dict({}).to_dict()
    unknown = sorted(set(mm_fields) - set(known))
    if unknown:
        raise LlavaError(f"the LLaVA config has no field {', '.join(unknown)}")
    return config_class.from_dict(
        fields | {"mm_vision_tower": tower_name, "mm_vision_config": vision_config} | mm_fields
    )
