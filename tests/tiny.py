"""Tiny models made on the spot: a tokenizer, a language model, a CLIP tower and a LLaVA of the three.

Everything is random but fixed by `seed`; a whole LLaVA takes well under a second and a few hundred kilobytes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

CORPUS = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions. ###Human: Hi! ###Assistant: Hi there! USER: "
    "ASSISTANT: [INST] <<SYS>> You are a helpful language and vision assistant. <</SYS>> [/INST] yes no left "
    "right What does the picture show? Is there a fracture? The chest X-ray shows a large nodule in the lung. "
    "0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?'\"()[]<>/#&%+-*=_\n"
)

IMAGE_SIZE = 28
PATCH_SIZE = 14


def make_tokenizer(folder: str | Path, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE tokenizer in the manner of LLaMA's (<unk> 0, <s> 1, </s> 2), written to `folder`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special[:3], show_progress=False)
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    return _wrap(tokenizer, special, Path(folder))


def make_chatml_tokenizer(folder: str | Path, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of Qwen2's (no begin token, <|im_end|> ends), written to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        padding_side="right",
    )
    fast.save_pretrained(folder)
    return fast


def make_llm(folder: str | Path, kind: str = "llama", *, seed: int = 0, **fields: Any) -> Path:
    """A language model (`llama`, `mistral`, `qwen2`) of two layers with its tokenizer, written to `folder`."""
    folder = Path(folder)
    tokenizer = make_chatml_tokenizer(folder) if kind == "qwen2" else make_tokenizer(folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "llama" else 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind == "mistral":
        sizes["sliding_window"] = None
    with _seeded(seed):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | fields)).eval().save_pretrained(folder)
    return folder


_TOWER_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}


def make_clip(folder: str | Path, *, seed: int = 1, **fields: Any) -> Path:
    """A CLIP vision tower of three blocks for 28 px images (4 patches), written to `folder`."""
    folder = Path(folder)
    config = CLIPVisionConfig(**_TOWER_SIZES | fields)
    with _seeded(seed):
        CLIPVisionModel(config).eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "size": {"shortest_edge": config.image_size},
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make_tower(folder: str | Path, kind: str, processor: dict[str, Any], *, seed: int = 1, **fields: Any) -> Path:
    """A vision model of the library of three blocks (`siglip_vision_model`, `dinov2`, …), written to `folder`.

    `processor` is its preprocessor_config.json.
    """
    folder = Path(folder)
    with _seeded(seed):
        AutoModel.from_config(AutoConfig.for_model(kind, **_TOWER_SIZES | fields)).eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make_llava(folder: str | Path, kind: str = "llama", *, seed: int = 2, **mm_fields: Any) -> Path:
    """A LLaVA written to `folder` (base models in `folder/llm` and `folder/clip`, the checkpoint in `folder/llava`).

    `mm_fields` go to `llava.model.build_model_from_llm`; `tie_word_embeddings` to the language model. Returns the
    checkpoint's folder.
    """
    from llava.model import build_model_from_llm, save_model
    from llava.model.families import find_family

    folder = Path(folder)
    llm = make_llm(folder / "llm", kind, tie_word_embeddings=mm_fields.pop("tie_word_embeddings", False))
    clip = make_clip(folder / "clip")
    mm_fields = {"conversation_template": find_family(kind).default_template} | mm_fields
    with _seeded(seed):
        tokenizer, model, processor, _ = build_model_from_llm(llm, clip, device="cpu", **mm_fields)
    save_model(folder / "llava", model, tokenizer, processor)
    return folder / "llava"


def make_chat_llava(
    folder: str | Path, *, digits: bool = False, tied: bool = True, tower: Path | None = None, **fields: Any
) -> tuple[Path, Path]:
    """A LLaVA over a language model of SmolLM2's form: byte-level vocabulary with ChatML's marks, tied embeddings.

    Returns (checkpoint, language model). `digits` cuts digits apart, `fields` go to the language model.
    """
    from llava.model import build_model_from_llm, save_model

    folder = Path(folder)
    make_chatml_tokenizer(folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% endfor %}"
    if digits:
        cut = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llm = make_llm(folder / "llm", "llama", vocab_size=len(tokenizer), tie_word_embeddings=tied, **ids | sizes | fields)
    tokenizer.save_pretrained(llm)
    loaded = build_model_from_llm(
        llm,
        tower or make_clip(folder / "clip"),
        device="cpu",
        conversation_template="chatml",
        mm_projector_type="mlp2x_gelu",
    )
    save_model(folder / "llava", loaded.model, loaded.tokenizer, loaded.image_processor)
    return folder / "llava", llm


def hub_cache(folder: str | Path, models: dict[str, Path]) -> Path:
    """A cache as the hub's client keeps it, written to `folder`: {hub id: folder of its files}."""
    for repo_id, files in models.items():
        repo = Path(folder) / f"models--{repo_id.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        shutil.copytree(files, repo / "snapshots" / ("0" * 40))
    return Path(folder)


class _seeded:
    """Torch's random numbers from a seed, and as they were afterwards."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self):
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_):
        torch.set_rng_state(self.state)


def _wrap(tokenizer: Tokenizer, special: list[str], folder: Path) -> PreTrainedTokenizerFast:
    content = json.loads(tokenizer.to_str())
    merges, learned = content["model"]["merges"], content["model"]["vocab"]
    # Byte tokens come right after the special ones, as in LLaMA's vocabulary.
    ordered = special + [token for token in sorted(learned, key=learned.get) if token not in special]
    content["model"]["vocab"] = {token: index for index, token in enumerate(ordered)}
    content["model"]["merges"] = merges
    content["added_tokens"] = [
        token | {"id": content["model"]["vocab"][token["content"]]} for token in content["added_tokens"]
    ]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return fast
