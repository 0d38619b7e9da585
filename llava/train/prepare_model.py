"""The model that a run trains: loaded or built, its settings from flags, and only the asked-for parts trainable."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN
from llava.conversation import get_template
from llava.errors import LlavaError
from llava.model import LoadedModel, add_image_tokens, build_model_from_llm, load_pretrained_model
from llava.model.checkpoint.config import STAGE_1_TEMPLATE, template_for_training
from llava.model.families import find_family
from llava.model.language_model import LlavaForCausalLM
from llava.model.tokenizer import token_id
from llava.model.weights.locate import locate_model
from llava.records import read_json
from llava.train.arguments import Arguments, ModelArguments
from llava.train.output.projector_file import load_projector
from llava.train.step import gpu

logger = logging.getLogger(__name__)


def prepare_model(arguments: Arguments) -> LoadedModel:
    """Load what `--model_name_or_path` names (a LLaVA checkpoint, or a language model to make one of).

    Returns it on the CPU (the Trainer moves it), what is trained in float32 (in bfloat16 with `--master_weights
    False`), with the flags' settings in its config and `requires_grad` set.

    Raises:
        LlavaError: a folder is incomplete, a flag contradicts the checkpoint, or nothing would be trained.
    """
    folder = locate_model(arguments.model.model_name_or_path, cache_dir=arguments.training.cache_dir)
    loaded = _build(folder, arguments) if is_language_model(folder) else _load(folder, arguments)
    make_ready(loaded, arguments)
    if arguments.model.pretrain_mm_mlp_adapter:
        rows = start_end_ids(loaded.model, loaded.tokenizer)
        load_projector(loaded.model, arguments.model.pretrain_mm_mlp_adapter, rows)
    return loaded


def make_ready(loaded: LoadedModel, arguments: Arguments) -> None:
    """Give a model of any origin the flags' settings, its image tokens, and `requires_grad` of what is trained."""
    model_args, training = arguments.model, arguments.training
    model, tokenizer = loaded.model, loaded.tokenizer
    _settings(model, arguments, loaded.tokenizer.chat_template)
    add_image_tokens(model, tokenizer)
    tokenizer.model_max_length = training.model_max_length
    tokenizer.padding_side = "right"
    dtype = torch.float32 if training.master_weights else torch.bfloat16
    choose_trainable(model, model_args, adapters=training.lora_enable, dtype=dtype)
    if model_args.tune_mm_mlp_adapter and model.config.mm_use_im_start_end:
        train_rows(model, start_end_ids(model, tokenizer))


def load_dtype(folder: Path, arguments: Arguments) -> torch.dtype:
    """float32, of which half-precision copies are made; bfloat16 with `--master_weights False`.

    A language model that stays frozen on a GPU keeps its file's dtype. (So stage 1 and LoRA hold two bytes per frozen
    weight, and stage 1 writes it back unchanged.)
    """
    flags, training = arguments.model, arguments.training
    if not training.master_weights:
        return torch.bfloat16
    frozen = flags.tune_mm_mlp_adapter or flags.freeze_backbone or training.lora_enable
    if not (frozen and gpu.is_on_gpu(training.device) and (training.bf16 or training.fp16)):
        return torch.float32
    config = read_json(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def choose_trainable(
    model: LlavaForCausalLM, arguments: ModelArguments, adapters: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """Set `requires_grad` as the flags say; the tower stays frozen unless it is asked for.

    With `adapters`, which come later, the language model itself is frozen. What is trained is kept in `dtype`.
    """
    language_model = not (arguments.freeze_backbone or arguments.tune_mm_mlp_adapter or adapters)
    projector = not arguments.freeze_mm_mlp_adapter
    for parameter in model.parameters():
        # Quantized weights are integers and can't be trained themselves.
        parameter.requires_grad_(language_model and parameter.is_floating_point())
    model.get_model().mm_projector.requires_grad_(projector)
    model.get_vision_tower().requires_grad_(arguments.unfreeze_mm_vision_tower)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if not adapters and not any(parameter.requires_grad for parameter in model.parameters()):
        raise LlavaError(
            "nothing is left to train: language model, projector and tower are all frozen; "
            "drop --freeze_backbone or --freeze_mm_mlp_adapter"
        )


def train_rows(model: LlavaForCausalLM, rows: list[int]) -> None:
    """Let stage 1 learn the input embeddings of the tokens around an image, and those alone (as the reference): the
    trainer leaves the others as they are."""
    weight = model.get_input_embeddings().weight
    weight.requires_grad_(True)
    weight.data = weight.data.float()
    model.trained_rows = rows


def start_end_ids(model: LlavaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of <im_start> and <im_end>, [] where the model doesn't use them."""
    if not model.config.mm_use_im_start_end:
        return []
    return [token_id(tokenizer, token) for token in (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN)]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that pads batches; masked everywhere, so any will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def is_language_model(folder: Path) -> bool:
    """Whether a folder holds a plain language model, of which a LLaVA is to be made."""
    if (folder / "adapter_config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    family = find_family(config.get("model_type"))
    return family is not None and family.name == config["model_type"] and not config.get("mm_vision_tower")


def _build(folder: Path, arguments: Arguments) -> LoadedModel:
    flags = arguments.model
    if arguments.training.bits < 16:
        raise LlavaError(
            f"--bits {arguments.training.bits}: {folder} is a language model without a projector; train one first "
            "(--tune_mm_mlp_adapter True, 16 bits) and start from its output"
        )
    if not flags.vision_tower:
        raise LlavaError(f"{folder} is a language model without a vision tower; give one with --vision_tower")
    torch.manual_seed(arguments.training.seed)  # the projector's first weights
    return build_model_from_llm(
        folder,
        flags.vision_tower,
        device="cpu",
        dtype=load_dtype(folder, arguments),
        attn_implementation=flags.attn_implementation,
        cache_dir=arguments.training.cache_dir,
        **new_model_fields(flags),
    )


def new_model_fields(flags: ModelArguments) -> dict[str, Any]:
    """Fields of a new LLaVA's config that the flags give."""
    names = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def _load(folder: Path, arguments: Arguments) -> LoadedModel:
    flags = arguments.model
    loaded = load_pretrained_model(
        folder,
        device="cpu",
        dtype=load_dtype(folder, arguments),
        load_8bit=arguments.training.bits == 8,
        load_4bit=arguments.training.bits == 4,
        quant_type=arguments.training.quant_type,
        double_quant=arguments.training.double_quant,
        cache_dir=arguments.training.cache_dir,
        vision_tower=flags.vision_tower,
        attn_implementation=flags.attn_implementation,
    )
    config = loaded.model.config
    fixed = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_image_token_scheme")
    for name in fixed:
        wanted, own = getattr(flags, name), getattr(config, name)
        if wanted is not None and wanted != own:
            raise LlavaError(f"--{name} {wanted}: the checkpoint {folder} was made with {own}; leave the flag out")
    return loaded


def _settings(model: LlavaForCausalLM, arguments: Arguments, chat_template: str | None) -> None:
    """Settings of this run that the checkpoint has to remember."""
    config, flags = model.config, arguments.model
    if flags.mm_use_im_start_end not in (None, config.mm_use_im_start_end):
        logger.warning(
            "--mm_use_im_start_end %s: the checkpoint was made with %s; without the flag that is kept",
            *(flags.mm_use_im_start_end, config.mm_use_im_start_end),
        )
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token", "mm_image_token_scheme"):
        if getattr(flags, name) is not None:
            setattr(config, name, getattr(flags, name))
    if arguments.data.data_description is not None:
        config.trained_on = arguments.data.data_description
    if arguments.data.image_aspect_ratio is not None:
        config.image_aspect_ratio = arguments.data.image_aspect_ratio
    config.unfreeze_mm_vision_tower = flags.unfreeze_mm_vision_tower or config.unfreeze_mm_vision_tower
    own, usual = config.conversation_template, template_for_training(config, chat_template)
    name = arguments.model.version or usual
    get_template(name)
    if own not in (None, STAGE_1_TEMPLATE) and name not in (own, usual):
        logger.warning("--version %s: the checkpoint's own template is %s; without the flag it is kept", name, usual)
    config.conversation_template = name
