"""A vision tower and its projector as llama.cpp's `clip` file: CLIP and SigLIP as they are, DINOv2 as a plain ViT.

The llama.cpp of today misplaces class tokens (CLIP, DINOv2): llava.model.gguf.class_token. SigLIP has none.
"""

import re
from collections.abc import Iterator
from functools import partial

import torch
from einops import rearrange
from gguf import GGUFWriter
from torch.nn.functional import interpolate

from llava.errors import LlavaError
from llava.images import ImageProcessor
from llava.model.checkpoint.resolved import ResolvedCheckpoint
from llava.model.gguf.class_token import Tensor, Widening, spread_of
from llava.model.towers import CLIP, VisionTower
from llava.model.towers.base import TOWER_PREFIX

DINOV2, SIGLIP = "dinov2", "siglip_vision_model"
FIRST, LAST = "first", "last"
PROJECTOR = "mlp"
POSITIONS = "v.position_embd.weight"
_SHIFT = 256.0
"""What a linear projector's values are shifted by, so that GELU leaves them as they are."""

_BLOCK_PARTS = (
    (r"(?:layer_norm1|norm1)\.", "ln1."),
    (r"(?:layer_norm2|norm2)\.", "ln2."),
    (r"(?:self_attn\.q_proj|attention\.(?:attention\.query|q_proj))\.", "attn_q."),
    (r"(?:self_attn\.k_proj|attention\.(?:attention\.key|k_proj))\.", "attn_k."),
    (r"(?:self_attn\.v_proj|attention\.(?:attention\.value|v_proj))\.", "attn_v."),
    (r"(?:self_attn\.out_proj|attention\.(?:output\.dense|o_proj))\.", "attn_out."),
    (r"mlp\.fc1\.", "ffn_up."),
    (r"mlp\.fc2\.", "ffn_down."),
)
_WHOLE = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.cls_token": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.patch_embeddings.projection.weight": "v.patch_embd.weight",
    "embeddings.patch_embeddings.projection.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": POSITIONS,
    "embeddings.position_embeddings": POSITIONS,
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_GELU = ("gelu", "gelu_pytorch_tanh")
_LEFT_OUT = ("embeddings.mask_token", "embeddings.position_ids")
"""Of pretraining alone, or counted by whoever reads the file."""
_SCALES = {"attn_out.": "layer_scale1.lambda1", "ffn_down.": "layer_scale2.lambda1"}


def add_vision_fields(
    writer: GGUFWriter, checkpoint: ResolvedCheckpoint, processor: ImageProcessor, widening: Widening | None
) -> None:
    """What llama.cpp wants to know of tower and projector."""
    tower, vision = checkpoint.model.get_vision_tower(), checkpoint.config.mm_vision_config
    hidden, blocks, epsilon = tower.hidden_size, tower.used_blocks, vision["layer_norm_eps"]
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type(PROJECTOR)
    writer.add_vision_projection_dim(checkpoint.config.hidden_size)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.image_size // tower.patches_per_side)
    writer.add_vision_embedding_length(widening.width if widening else hidden)
    writer.add_vision_feed_forward_length(vision.get("intermediate_size") or int(hidden * vision["mlp_ratio"]))
    writer.add_vision_block_count(blocks + bool(widening))
    # The output of that many blocks, whatever the file holds.
    writer.add_array("clip.vision.feature_layer", [blocks, blocks + 1] if widening else [blocks])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(widening.epsilon(epsilon) if widening else epsilon)
    mean, std = _normalisation(processor)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    writer.add_vision_use_gelu(vision["hidden_act"] in _GELU)


def _normalisation(processor: ImageProcessor) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) for a program that always takes levels of 0 to 1, and always normalises."""
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return [value / scale for value in mean], [value / scale for value in std]


def widening_of(checkpoint: ResolvedCheckpoint) -> Widening | None:
    """How the tower is written for a llama.cpp that puts class tokens last; None for a tower without."""
    tower, vision = checkpoint.model.get_vision_tower(), checkpoint.config.mm_vision_config
    if not tower.prefix_tokens:
        return None
    if not tower.used_blocks:
        raise LlavaError(f"{checkpoint.folder}: features of no block of the tower; serve the native folder")
    known = {name: make for name, _, make in vision_tensors(checkpoint, LAST)}
    norm = [known[name]().float() for name in ("v.pre_ln.weight", "v.pre_ln.bias") if name in known]
    bias = known.get("v.patch_embd.bias")
    positions = known[POSITIONS]()
    return Widening(
        hidden=tower.hidden_size,
        heads=vision["num_attention_heads"],
        blocks=tower.used_blocks,
        tokens=len(positions),
        pre_norm=(norm[0], norm[1]) if norm else None,
        spread=spread_of(known["v.patch_embd.weight"](), bias and bias(), positions),
    )


def vision_tensors(checkpoint: ResolvedCheckpoint, class_token: str = FIRST) -> Iterator[Tensor]:
    """The tensors of the file, those of blocks that aren't run left out.

    Args:
        class_token: whether its position embedding is the `first` or the `last`.

    Raises:
        LlavaError: a tower, projector or choice of features that llama.cpp's LLaVA doesn't know.
    """
    tower, config = checkpoint.model.get_vision_tower(), checkpoint.config
    family = (config.mm_vision_config or {}).get("model_type", CLIP)
    _check(checkpoint, family)
    prefix = TOWER_PREFIX + tower.block_prefix.rpartition("encoder.")[0]
    for name in checkpoint.names:
        if not name.startswith(TOWER_PREFIX):
            continue
        own = name.removeprefix(TOWER_PREFIX)
        if tower.is_unused_layer(own) or name.removeprefix(prefix).startswith(_LEFT_OUT):
            continue
        shape = checkpoint.shape(name)
        block = tower.block_of(own)
        if block is None:
            stored = _WHOLE.get(name.removeprefix(prefix))
            if stored is None:
                raise _without_place(checkpoint, name)
            if stored == POSITIONS:
                positions = _positions(checkpoint.read(name), tower, class_token)
                yield stored, tuple(positions.shape), partial(torch.Tensor.float, positions)
            else:
                shape = (shape[-1],) if stored == "v.class_embd" else shape
                yield stored, shape, partial(_shaped, checkpoint, name, shape)
            continue
        start = f"{TOWER_PREFIX}{tower.block_prefix}{block}."
        part = name.removeprefix(start)
        if "layer_scale" in part:
            continue
        stored = next((re.sub(pattern, new, part) for pattern, new in _BLOCK_PARTS if re.match(pattern, part)), None)
        if stored is None:
            raise _without_place(checkpoint, name)
        scale = next((start + lam for key, lam in _SCALES.items() if stored.startswith(key)), None)
        scale = scale if scale in checkpoint.names else None
        yield f"v.blk.{block}.{stored}", shape, partial(_scaled, checkpoint, name, scale)
    yield from _projector(checkpoint)


def _check(checkpoint: ResolvedCheckpoint, family: str) -> None:
    config, where = checkpoint.config, checkpoint.folder
    act = config.mm_vision_config.get("hidden_act")
    for fault, words in (
        (family not in (CLIP, DINOV2, SIGLIP), f"the tower {family!r}; it takes CLIP's, DINOv2's and SigLIP's"),
        (config.mm_vision_select_feature != "patch", "a class token among the features (mm_vision_select_feature)"),
        (config.mm_projector_type not in ("linear", "mlp2x_gelu"), f"the projector {config.mm_projector_type!r}"),
        (act not in (*_GELU, "quick_gelu"), f"the activation {act!r} in the tower"),
        (bool(config.mm_vision_config.get("use_swiglu_ffn")), "DINOv2-giant's gated blocks"),
    ):
        if fault:
            raise LlavaError(f"{where}: llama.cpp's LLaVA doesn't know {words}; serve the native folder")


def _without_place(checkpoint: ResolvedCheckpoint, name: str) -> LlavaError:
    return LlavaError(f"{checkpoint.folder}: {name} has no place in llama.cpp's file of a vision tower")


def _positions(table: torch.Tensor, tower: VisionTower, class_token: str) -> torch.Tensor:
    """Position embeddings `[tokens, hidden]` for the tower's images; DINOv2's are of others, and interpolated."""
    table = table.reshape(-1, table.shape[-1]).float()
    side, tokens = tower.patches_per_side, tower.prefix_tokens
    first, grid = table[:tokens], table[tokens:]
    old = round(len(grid) ** 0.5)
    if old != side:
        square = rearrange(grid, "(row column) width -> 1 width row column", row=old)
        square = interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
        grid = rearrange(square, "1 width row column -> (row column) width")
    return torch.cat([grid, first] if class_token == LAST else [first, grid])


def _shaped(checkpoint: ResolvedCheckpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return checkpoint.read(name).reshape(shape)


def _scaled(checkpoint: ResolvedCheckpoint, name: str, scale: str | None) -> torch.Tensor:
    """A block's tensor; what a layer scale multiplies the output of is multiplied here."""
    tensor = checkpoint.read(name)
    if scale is None:
        return tensor
    factor = checkpoint.read(scale).float()
    return tensor.float() * (factor[:, None] if tensor.ndim == 2 else factor)


def _projector(checkpoint: ResolvedCheckpoint) -> Iterator[Tensor]:
    """The projector's layers. llama.cpp's have GELU behind the first: a single layer is shifted to where that does
    nothing, and back by a second one.
    """
    start = "model.mm_projector."
    width = checkpoint.config.hidden_size
    if checkpoint.config.mm_projector_type == "linear":
        yield "mm.0.weight", checkpoint.shape(start + "weight"), partial(checkpoint.read, start + "weight")
        yield "mm.0.bias", (width,), lambda: checkpoint.read(start + "bias").float() + _SHIFT
        yield "mm.2.weight", (width, width), lambda: torch.eye(width)
        yield "mm.2.bias", (width,), lambda: torch.full((width,), -_SHIFT)
        return
    for layer in (0, 2):
        for leaf in ("weight", "bias"):
            name = f"{start}{layer}.{leaf}"
            yield f"mm.{layer}.{leaf}", checkpoint.shape(name), partial(checkpoint.read, name)
