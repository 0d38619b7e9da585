"""Liger's fused kernels in a language model's layers: RMSNorm, rotary positions, SwiGLU.

The loss stays llava.model.loss's: like Liger's it never holds whole logits, and its products are aligned.
"""

from llava.errors import LlavaError, require
from llava.model.families import family_of
from llava.model.language_model import LlavaForCausalLM


def use_liger_kernels(model: LlavaForCausalLM) -> None:
    """Let the layers of `model` compute with Liger's kernels, which need a GPU.

    Raises:
        LlavaError: the package is missing, or has no kernels for this family.
    """
    kernels = require("liger_kernel.transformers.monkey_patch", "liger")
    family = family_of(model.config).name
    apply = kernels.MODEL_TYPE_TO_APPLY_LIGER_FN.get(family)
    if apply is None:
        raise LlavaError(f"--use_liger_kernel: Liger has no kernels for {family}; use --torch_compile True")
    apply(model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
