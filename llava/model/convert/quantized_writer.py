"""Saving a checkpoint whose language model is in 8 or 4 bits, as BabyDoctor was released."""

from pathlib import Path
from typing import Literal

from llava.errors import LlavaError
from llava.folders import check_target, stage
from llava.model.checkpoint.layouts import open_checkpoint
from llava.model.convert.model_card import write_model_card
from llava.model.loader import load_pretrained_model
from llava.model.saver import save_model
from llava.model.weights.locate import locate_model


def quantize(
    model_path: str | Path,
    output: str | Path,
    bits: int = 8,
    model_base: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quant_type: Literal["nf4", "fp4"] | None = None,
    double_quant: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Load a checkpoint in `bits` and write it so; tower, projector and head keep 16 or 32 bits.

    Args:
        dtype: of what isn't quantized; float16 by default.
        quant_type, double_quant: `load_pretrained_model`'s, for 4 bits.

    Raises:
        LlavaError: it is quantized already, bitsandbytes is missing, `load_pretrained_model`'s.
    """
    if bits not in {8, 4}:
        raise LlavaError(f"bits must be 8 or 4, not {bits}")
    output = check_target(output, overwrite)
    folder = locate_model(model_path)
    base = None if model_base is None else locate_model(model_base, "base model", relative_to=folder)
    if open_checkpoint(folder, base).quantized:
        raise LlavaError(f"{folder}: the weights are already stored in 8 or 4 bits; give the 16-bit checkpoint")
    tokenizer, model, processor, _ = load_pretrained_model(
        folder,
        base,
        device=device,
        dtype=dtype or "float16",
        load_8bit=bits == 8,
        load_4bit=bits == 4,
        quant_type=quant_type,
        double_quant=double_quant,
    )
    with stage(output, overwrite=overwrite) as staging:
        save_model(staging, model, tokenizer, processor)
        write_model_card(
            staging,
            f"A LLaVA checkpoint, its language model in {bits} bits (bitsandbytes); vision tower, projector "
            f"and head are not. Answers differ somewhat from the original's.",
            base=str(model_base) if model_base else None,
            source=str(model_path),
        )
    return output
