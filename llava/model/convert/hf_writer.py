"""From LLaVA's layout to transformers' `LlavaForConditionalGeneration`, and back (llava.model.convert.hf_reader).

Exported folders serve in `transformers serve`, vLLM and whatever else reads that layout. The vocabulary grows by
<image> and <pad> and to a multiple of 64; new rows are the mean of the old ones, so that no new token can ever
have the highest score.
"""

import logging
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AddedToken, LlavaConfig, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.errors import LlavaError
from llava.folders import check_space, check_target, stage
from llava.model.checkpoint.resolved import ResolvedCheckpoint, resolve_checkpoint
from llava.model.configuration import LlavaConfigFields, older_rope_fields
from llava.model.convert.chat_template import chat_template
from llava.model.convert.model_card import write_model_card
from llava.model.convert.other_files import find_generation_config
from llava.model.families import EMBEDDINGS, family_of
from llava.model.loader import load_image_processor
from llava.model.tokenizer import load_tokenizer_of, save_tokenizer, token_id
from llava.model.towers import CLIP, VisionTower
from llava.model.towers.base import TOWER_PREFIX
from llava.model.weights.shards import MAX_SHARD_BYTES, RESUMABLE, Fill, Planned, planned_tensor, write_shards
from llava.records import read_json, write_json
from llava.tokenization import ImageTokens, stop_token_ids, tokenize_prompt

log = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"
VOCABULARY_MULTIPLE = 64
EXPORT_NOTE = "llava_export"
"""Field of the exported config.json: what was added, so that the import can take it away."""

LINEAR_NOTE = (
    "The projector is one linear layer. This layout has two, so the second is the identity (`projector_hidden_act: "
    '"linear"`): transformers takes that, vLLM is believed to refuse it.'
)

TOWER_NOTE = "The vision tower is neither CLIP nor SigLIP: transformers runs it here, other engines may refuse it."

_WIDELY_KNOWN = (CLIP, "siglip_vision_model")
_PROJECTOR = {
    "linear": {"model.mm_projector.": "multi_modal_projector.linear_1."},
    "mlp2x_gelu": {
        "model.mm_projector.0.": "multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    },
}
_PREFIXES = {
    TOWER_PREFIX + "vision_tower.": "vision_tower.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_NOISE = {
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
}


def export_hf(
    model_path: str | Path,
    output: str | Path,
    model_base: str | Path | None = None,
    *,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a checkpoint of any layout as `LlavaForConditionalGeneration` with processor and chat template.

    Args:
        dtype: cast all weights; by default each keeps its own.

    Raises:
        LlavaError: what the layout can't hold (a tower that the library lacks, deeper projectors, anyres), and
            `resolve_checkpoint`'s.
    """
    output = check_target(output, overwrite)
    checkpoint = resolve_checkpoint(model_path, model_base, vision_tower)
    config = checkpoint.config
    _check_expressible(checkpoint)
    folders = checkpoint.parts.folders
    tokenizer = load_tokenizer_of(folders, folders[0])
    note = _add_tokens(tokenizer, config.vocab_size)
    rows = -(-max(config.vocab_size, len(tokenizer)) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    tower_layers, feature_layer = _tower_layers(checkpoint)
    tensors = _plan(checkpoint, rows, tower_layers, dtype)
    check_space(output, sum(tensor.nbytes for tensor in tensors))
    with stage(output, overwrite=overwrite, resume=RESUMABLE) as folder:
        write_shards(folder, tensors, checkpoint.files, max_shard_bytes=max_shard_bytes)
        hf = _hf_config(checkpoint, tokenizer, note, rows, tower_layers, feature_layer, dtype)
        write_json(folder / "config.json", hf)
        _write_processor(folder, checkpoint, tokenizer)
        _write_generation_config(folder, checkpoint, tokenizer)
        notes: tuple[str, ...] = ("Layout: transformers' `LlavaForConditionalGeneration`.",)
        for applies, words in (
            (config.mm_projector_type == "linear", LINEAR_NOTE),
            (config.mm_vision_config.get("model_type", CLIP) not in _WIDELY_KNOWN, TOWER_NOTE),
        ):
            if applies:
                log.warning(words)
                notes += (words,)
        write_model_card(
            folder,
            "A LLaVA checkpoint for transformers and the engines that read its layout.",
            base=str(model_base) if model_base else None,
            source=str(model_path),
            notes=notes,
        )
    return output


def hf_name(name: str, projector_type: str) -> str:
    """transformers' name (on disk) of LLaVA's tensor `name`."""
    for prefix, new in (*_PROJECTOR[projector_type].items(), *_PREFIXES.items()):
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    raise LlavaError(f"{name} has no place in transformers' LLaVA layout")


def _check_expressible(checkpoint: ResolvedCheckpoint) -> None:
    config, where = checkpoint.config, checkpoint.folder
    kind, tower = config.mm_vision_config.get("model_type"), checkpoint.model.get_vision_tower()
    if tower.library_config() is None:
        raise LlavaError(
            f"{where}: transformers' LLaVA layout takes vision models of that library, this tower is {kind!r}; "
            f"serve the native folder"
        )
    if tower.prefix_tokens > 1 and tower.select_feature == "patch":
        raise LlavaError(
            f"{where}: transformers' LLaVA layout drops one token before the patches or none, this tower {kind!r} "
            f"has {tower.prefix_tokens}; serve the native folder"
        )
    if config.mm_projector_type not in _PROJECTOR:
        raise LlavaError(
            f"{where}: transformers' LLaVA layout has no projector {config.mm_projector_type!r}; it takes "
            f"{' and '.join(_PROJECTOR)}; serve the native folder"
        )
    if config.image_aspect_ratio in {"anyres", "keep"}:
        raise LlavaError(
            f"{where}: image_aspect_ratio {config.image_aspect_ratio!r} has no counterpart in transformers' LLaVA "
            f"layout, answers would differ without a word; serve the native folder"
        )


def _add_tokens(tokenizer: PreTrainedTokenizerBase, native_rows: int) -> dict[str, Any]:
    """Add <image> and <pad>; returns what the import needs to know."""
    added = [token for token in (DEFAULT_IMAGE_TOKEN, PAD_TOKEN) if token not in tokenizer.get_vocab()]
    note = {"vocab_size": native_rows, "added_tokens": added, "pad_token": tokenizer.pad_token}
    if len(tokenizer) < native_rows:
        log.info(
            "the tokenizer has %d tokens, the model %d rows: new tokens take free ones", len(tokenizer), native_rows
        )
    tokens = [AddedToken(token, normalized=False, special=True) for token in added]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.pad_token = PAD_TOKEN
    return note


def _select_strategy(tower: VisionTower) -> Literal["default", "full"]:
    """`default` drops the first token, which has to be a class token; `full` drops none."""
    return "default" if tower.select_feature == "patch" and tower.prefix_tokens else "full"


def _tower_layers(checkpoint: ResolvedCheckpoint) -> tuple[int, int]:
    """Blocks of the export and the hidden state that is taken; a tower may have been saved without its last block."""
    tower = checkpoint.model.get_vision_tower()
    blocks = {_block_of(tower, name) for name in checkpoint.names} - {None}
    if blocks == set(range(tower.num_blocks)):
        return tower.num_blocks, tower.select_layer
    log.info("the checkpoint has %d of the tower's %d blocks, all that are used", tower.used_blocks, tower.num_blocks)
    return tower.used_blocks, -1


def _block_of(tower: VisionTower, name: str) -> int | None:
    return tower.block_of(name.removeprefix(TOWER_PREFIX)) if name.startswith(TOWER_PREFIX) else None


def _plan(checkpoint: ResolvedCheckpoint, rows: int, tower_layers: int, dtype: torch.dtype | None) -> list[Planned]:
    config = checkpoint.config
    tower = checkpoint.model.get_vision_tower()
    planned = []
    for name in checkpoint.names:
        block = _block_of(tower, name)
        if block is not None and block >= tower_layers:
            continue
        new_name = hf_name(name, config.mm_projector_type)
        if name in EMBEDDINGS:
            shape = (rows, *checkpoint.shape(name)[1:])
            begin = _Grown(checkpoint, name)
            planned.append(Planned(new_name, shape, dtype or checkpoint.dtype(name), begin))
        else:
            planned.append(checkpoint.planned(name, new_name, dtype))
    own = dtype or next(checkpoint.dtype(name) for name in checkpoint.names if name.startswith(TOWER_PREFIX))
    # Never computed for the selected layer, but the layout has it.
    for name, shape in tower.tail_shapes.items():
        if TOWER_PREFIX + name not in checkpoint.names:
            make = torch.ones if name.endswith("norm.weight") else torch.zeros
            new_name = hf_name(TOWER_PREFIX + name, config.mm_projector_type)
            planned.append(planned_tensor(new_name, shape, own, partial(make, shape)))
    if config.mm_projector_type == "linear":
        size = config.hidden_size
        own = dtype or checkpoint.dtype("model.mm_projector.weight")
        second = "multi_modal_projector.linear_2."
        planned.append(planned_tensor(second + "weight", (size, size), own, lambda: torch.eye(size, dtype=own)))
        planned.append(planned_tensor(second + "bias", (size,), own, lambda: torch.zeros(size)))
    return planned


class _Grown:
    """An embedding with more rows: the old ones as they are, then their mean."""

    def __init__(self, checkpoint: ResolvedCheckpoint, name: str):
        self.checkpoint, self.name = checkpoint, name

    def __call__(self) -> Fill:
        tensor = self.checkpoint.read(self.name)
        flat, width = tensor.reshape(-1), tensor.shape[1]
        mean = sum(part.double().sum(dim=0) for part in tensor.split(1024)) / tensor.shape[0]

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            old = max(0, min(stop, flat.numel()) - start)
            out[:old].copy_(flat[start : start + old])
            if old < len(out):
                columns = torch.arange(start + old, stop) % width
                out[old:].copy_(mean[columns])

        return fill


def _hf_config(
    checkpoint: ResolvedCheckpoint,
    tokenizer: PreTrainedTokenizerBase,
    note: dict[str, Any],
    rows: int,
    tower_layers: int,
    feature_layer: int,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    config = checkpoint.config
    own_fields = {field.name for field in fields(LlavaConfigFields)}
    text_class = family_of(config).text_config_class
    known = {field.name for field in fields(text_class)}
    text = {name: value for name, value in config.to_dict().items() if name in known - own_fields}
    text |= {"vocab_size": rows, "pad_token_id": tokenizer.pad_token_id}
    for name in ("architectures", "transformers_version", "model_type", "_name_or_path"):
        text.pop(name, None)
    tower = checkpoint.model.get_vision_tower()
    hf = LlavaConfig(
        text_config=text_class(**text),
        vision_config=(tower.library_config() or {}) | {"num_hidden_layers": tower_layers},
        image_token_index=token_id(tokenizer, DEFAULT_IMAGE_TOKEN),
        image_seq_length=checkpoint.model.num_patches,
        projector_hidden_act="linear" if config.mm_projector_type == "linear" else "gelu",
        vision_feature_select_strategy=_select_strategy(tower),
        vision_feature_layer=feature_layer,
        tie_word_embeddings=config.tie_word_embeddings,
    ).to_dict()
    hf = _without_defaults(hf)
    hf["text_config"] |= older_rope_fields(hf["text_config"])
    kept = {name: getattr(config, name) for name in sorted(own_fields)}
    kept.pop("mm_vision_config")
    kept["mm_vision_select_layer"] = feature_layer
    stored = dtype or checkpoint.dtype(EMBEDDINGS[0])
    return (
        hf
        | kept
        | {
            "architectures": ["LlavaForConditionalGeneration"],
            "dtype": str(stored).removeprefix("torch."),
            "torch_dtype": str(stored).removeprefix("torch."),
            "pad_token_id": tokenizer.pad_token_id,
            EXPORT_NOTE: note,
        }
    )


def _without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that transformers writes for every model and none of these has."""
    return {
        name: _without_defaults(value) if name.endswith("_config") else value
        for name, value in config.items()
        if name not in _NOISE
    }


def _write_processor(folder: Path, checkpoint: ResolvedCheckpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    config, tower = checkpoint.config, checkpoint.model.get_vision_tower()
    tower_folder = checkpoint.parts.tower_folder
    processor = load_image_processor([*checkpoint.parts.folders, tower_folder], checkpoint.model)
    pads = config.image_aspect_ratio == "pad"
    processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    # A plain CLIP processor would centre-crop what the model was trained to see whole.
    settings = read_json(path) | {
        "image_processor_type": "LlavaImageProcessor" if pads else processor.kind,
        "do_pad": pads,
        "processor_class": "LlavaProcessor",
    }
    if not pads:
        settings.pop("do_pad")
    write_json(path, settings)
    tokenizer.chat_template = None
    template = make_chat_template(config, tokenizer)
    save_tokenizer(tokenizer, folder)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", tokenizer_config | {"processor_class": "LlavaProcessor"})
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": DEFAULT_IMAGE_TOKEN,
            "patch_size": config.mm_vision_config["patch_size"],
            "num_additional_image_tokens": tower.prefix_tokens,
            "vision_feature_select_strategy": _select_strategy(tower),
            "image_processor": {k: v for k, v in settings.items() if k != "processor_class"},
        },
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def make_chat_template(config: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text whose ids, in one piece, are those that LLaVA's own way of tokenising gives.

    LLaVA tokenises the text on both sides of an image apart; whether a blank or the begin token has to be written
    for the same ids depends on the tokenizer, so it is tried.
    """
    conversation = get_template(config.conversation_template)
    image_tokens = ImageTokens.from_config(config, tokenizer)
    image = DEFAULT_IMAGE_TOKEN
    if image_tokens.use_start_end:
        image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
    probe = "What is shown?"
    asked = conversation.copy()
    asked.append_message(asked.roles[0], asked.place_images(f"{DEFAULT_IMAGE_TOKEN}\n{probe}"))
    asked.append_message(asked.roles[1], None)
    image_id = token_id(tokenizer, DEFAULT_IMAGE_TOKEN)
    wanted = [
        image_id if token == IMAGE_TOKEN_INDEX else token
        for token in tokenize_prompt(asked.get_prompt(), tokenizer, image_tokens)
    ]
    glue_before = "" if conversation.image_first else "\n"
    message: dict[str, Any] = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": glue_before + probe}],
    }
    adds_bos = wanted[:1] == [tokenizer.bos_token_id]
    templates = [
        chat_template(conversation, image, bos, glue)
        for glue in ("\n", " \n")
        for bos in ((True, False) if adds_bos else (False,))
    ]
    for template in templates:
        text = cast(
            str,
            tokenizer.apply_chat_template(
                [message], chat_template=template, tokenize=False, add_generation_prompt=True
            ),
        )
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        if tokenizer(text, add_special_tokens=not has_bos).input_ids == wanted:
            return template
    log.warning(
        "no chat template gives quite the ids that %s was trained with; answers may differ a little",
        config.conversation_template,
    )
    return templates[0]


def _write_generation_config(folder: Path, checkpoint: ResolvedCheckpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """The checkpoint's or its base's own, and all that ends an answer: other engines don't know the template's mark."""
    found = find_generation_config(checkpoint.parts.folders)
    settings = {"bos_token_id": tokenizer.bos_token_id} | (read_json(found) if found else {})
    settings.pop("transformers_version", None)
    template, ends = get_template(checkpoint.config.conversation_template), settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = list(dict.fromkeys([*ends, *stop_token_ids(template, tokenizer)]))
    settings |= {"eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": tokenizer.pad_token_id}
    write_json(folder / "generation_config.json", settings)
