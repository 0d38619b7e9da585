"""llama.cpp's names of a language model's tensors, and what its files do to them."""

from typing import Any

import torch
from einops import rearrange
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava.model.families import EMBEDDING, FINAL_NORM, HEAD

ARCHITECTURE = "llama"
ROPE_FREQS = "rope_freqs.weight"

DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Values of `tokenizer.ggml.pre` whose text is cut before and after each digit, then as GPT-2's (llama.cpp's list)."""

_WHOLE = {"token_embd.weight": EMBEDDING, "output.weight": HEAD, "output_norm.weight": FINAL_NORM}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def language_names(layers: int) -> dict[str, str]:
    """{llama.cpp's name: transformers' name} of a LLaMA of so many blocks."""
    blocks = {
        f"blk.{layer}.{theirs}.weight": f"model.layers.{layer}.{ours}.weight"
        for layer in range(layers)
        for theirs, ours in _BLOCK.items()
    }
    return _WHOLE | blocks


def rotary_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp has them: the two values that a rotation mixes side by side."""
    return rearrange(weight, "(head two pair) ... -> (head pair two) ...", head=heads, two=2)


def rope_factors(config: Any) -> torch.Tensor:
    """`rope_freqs`: by what llama.cpp divides each frequency, of a configuration scaled as LLaMA-3.1's."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * len(scaled)
    return (1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width)) / scaled


def known_cuts() -> dict[str, str]:
    """{`tokenizer.ggml.pre`: the expression that cuts text}, by the library's list; older releases of it have none."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return {}
    return dict(GGUF_PRE_TOKENIZER_SPLITS)
