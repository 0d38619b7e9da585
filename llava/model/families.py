"""The families of language models that a LLaVA can be made of: one row each, read by everything that has to know.

A family whose model has the library's usual parts needs two classes, a row in `FAMILIES` and, if its models were
trained with a format of their own, a prompt template (llava.conversation.templates). The usual parts are
`model.embed_tokens`, `model.rotary_emb`, `model.layers.N`, `model.norm` and `lm_head`, without a bias, with nothing
scaled or capped between them; a block adds first its `self_attn` of `input_layernorm`, then its `mlp` of
`post_attention_layernorm`. What is inside attention and `mlp` is the family's own: joined projections (Phi-3), norms of
queries and keys (Qwen3). The engine runs it if all layers attend in one way, everywhere or within one window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from llava.errors import LlavaError
from llava.model.configuration import LlavaConfigFields
from llava.model.language_model import LlavaForCausalLM

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
EMBEDDINGS = (EMBEDDING, HEAD)
"""The tensors of any family with one row per token; a model with tied embeddings holds and stores the first alone."""

FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class Family:
    """What the rest of the package asks of a language-model family."""

    name: str
    """The library's `model_type` of the plain language model, also that of `text_config` in transformers' layout."""

    text_config_class: type[PreTrainedConfig]
    """The plain language model's configuration."""

    config_class: type[LlavaConfigFields]
    """The same with LLaVA's fields; its `model_type` stands in a checkpoint's config.json."""

    model_class: type[LlavaForCausalLM]
    """The multimodal model."""

    layer_class: type[nn.Module]
    """One block of the language model."""

    default_template: str
    """Prompt template of a checkpoint that names none."""

    training_template: str = "v0"
    """Prompt template of a training run over the plain language model without `--version`."""

    recognise_chat: Callable[[str], str | None] = lambda chat_template: None
    """From a plain language model's chat template (or ""): the template that renders the same, if there is one."""

    recognise_template: Callable[[Any, str], str | None] = lambda config, chat_template: None
    """From configuration and chat template (or ""): the template of a release that names none, if it can be told."""

    older_types: tuple[str, ...] = ()
    """Further values of `model_type` that LLaVA checkpoints of this family have."""

    @property
    def llava_types(self) -> tuple[str, ...]:
        """Values of `model_type` in a LLaVA checkpoint's config.json."""
        return (self.config_class.model_type, *self.older_types)


class LlavaLlamaConfig(LlavaConfigFields, LlamaConfig):
    model_type = "llava_llama"


LlavaConfig = LlavaLlamaConfig
"""LLaVA's own name of it."""


class LlavaLlamaForCausalLM(LlavaForCausalLM, LlamaForCausalLM):
    """LLaMA-1/2/3 (Vicuna, LLaVA-Med v1.0, LLaVA-1.5, BabyDoctor, SmolLM2) with images."""

    config: LlavaLlamaConfig
    config_class = LlavaLlamaConfig
    core_class = LlamaModel


class LlavaMistralConfig(LlavaConfigFields, MistralConfig):
    model_type = "llava_mistral"


class LlavaMistralForCausalLM(LlavaForCausalLM, MistralForCausalLM):
    """Mistral (LLaVA-Med v1.5) with images."""

    config: LlavaMistralConfig
    config_class = LlavaMistralConfig
    core_class = MistralModel


class LlavaQwen2Config(LlavaConfigFields, Qwen2Config):
    model_type = "llava_qwen2"


class LlavaQwen2ForCausalLM(LlavaForCausalLM, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with images."""

    config: LlavaQwen2Config
    config_class = LlavaQwen2Config
    core_class = Qwen2Model


def _llama_chat(chat_template: str) -> str | None:
    """LLaMA-3's marks and ChatML's, SmolLM2's system text with it."""
    marks = {
        "<|start_header_id|>": "llama_3",
        "named SmolLM, trained by Hugging Face": "smollm2",
        "<|im_start|>": "chatml",
    }
    return next((name for mark, name in marks.items() if mark in chat_template), None)


def _llama_template(config: Any, chat_template: str) -> str | None:
    """By the chat template, or LLaMA-2's 4096 positions under one Linear: BabyDoctor, LLaVA's LLaMA-2-chat models."""
    if known := _llama_chat(chat_template):
        return known
    if "<<SYS>>" in chat_template:
        return "llava_llama_2"
    if config.mm_projector_type == "linear" and config.max_position_embeddings >= 4096:
        return "llava_llama_2"
    return None


FAMILIES = (
    Family(
        "llama",
        LlamaConfig,
        LlavaLlamaConfig,
        LlavaLlamaForCausalLM,
        LlamaDecoderLayer,
        default_template="vicuna_v1",
        recognise_chat=_llama_chat,
        recognise_template=_llama_template,
        older_types=("llava",),
    ),
    Family(
        "mistral",
        MistralConfig,
        LlavaMistralConfig,
        LlavaMistralForCausalLM,
        MistralDecoderLayer,
        default_template="mistral_instruct",
    ),
    Family(
        "qwen2",
        Qwen2Config,
        LlavaQwen2Config,
        LlavaQwen2ForCausalLM,
        Qwen2DecoderLayer,
        default_template="qwen2",
        training_template="qwen2",
        older_types=("llava_qwen",),
    ),
)

for _family in FAMILIES:
    AutoConfig.register(_family.config_class.model_type, _family.config_class)
    AutoModelForCausalLM.register(_family.config_class, _family.model_class)


def family_names() -> str:
    """The names for a message: `llama or mistral`."""
    *names, last = (family.name for family in FAMILIES)
    return f"{', '.join(names)} or {last}"


def find_family(model_type: str | None) -> Family | None:
    """The family of a config.json's `model_type`, of the plain language model or of a LLaVA over it."""
    return next((family for family in FAMILIES if model_type in (family.name, *family.llava_types)), None)


def family_of_llm(model_type: str | None, where: Any) -> Family:
    """The family of a plain language model; `where` is for the message.

    Raises:
        LlavaError: no family has that `model_type`.
    """
    found = next((family for family in FAMILIES if family.name == model_type), None)
    if found is None:
        raise LlavaError(f"{where}: language models of type {model_type!r} aren't supported; use {family_names()}")
    return found


def family_of(config: LlavaConfigFields) -> Family:
    """The family of a LLaVA configuration."""
    return next(family for family in FAMILIES if isinstance(config, family.config_class))


def model_class_of(config: LlavaConfigFields) -> type[LlavaForCausalLM]:
    """The multimodal model's class for a LLaVA configuration."""
    return family_of(config).model_class


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the language model in `model`, whatever stands around it (LoRA's wrapper, say), in order."""
    classes = tuple(family.layer_class for family in FAMILIES)
    return [module for module in model.modules() if isinstance(module, classes)]
