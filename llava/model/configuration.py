"""What a LLaVA configuration adds to its language model's fields (llava.model.families joins the two).

A checkpoint's config.json carries all that is needed to run the model; nothing is read off a folder's name.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava.constants import SCHEME_PLACEHOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    class _LanguageModelConfig(PreTrainedConfig):
        """What every family's configuration has of its own: the other base of the classes in llava.model.families."""

        vocab_size: int
        hidden_size: int
        num_hidden_layers: int
        max_position_embeddings: int
        tie_word_embeddings: bool
else:
    _LanguageModelConfig = object


@dataclass(kw_only=True)
class LlavaConfigFields(_LanguageModelConfig):
    """Fields that a LLaVA config adds to those of its language model (`mm_*` as the releases name them)."""

    mm_vision_tower: str | None = None
    """Hub id or folder of the vision tower; where the checkpoint holds the tower itself, only its origin."""

    mm_vision_config: dict[str, Any] | None = None
    """The tower's own configuration. With it the model is built without looking for `mm_vision_tower`."""

    mm_hidden_size: int | None = None
    """Width of the tower's features."""

    mm_vision_select_layer: int = -2
    """Which of the tower's hidden states is used (0 is the embedding, -1 the last block's output)."""

    mm_vision_select_feature: str = "patch"
    """`patch` drops the class token, `cls_patch` keeps it."""

    mm_projector_type: str = "linear"
    """`linear`, `mlpNx_gelu` or `identity`."""

    mm_image_token_scheme: str = SCHEME_PLACEHOLDER
    """`placeholder` (v1.5: one <image> becomes the features) or `patch` (v1.0: a run of <im_patch> tokens)."""

    mm_use_im_start_end: bool = False
    """Whether <im_start> and <im_end> stand around an image."""

    mm_use_im_patch_token: bool = False
    """Whether <im_patch> was added to the vocabulary."""

    image_aspect_ratio: str | None = None
    """How an image is brought to the tower's square: None or `square` (crop), `pad`, `keep`, `anyres`."""

    image_grid_pinpoints: list[Any] | str | None = None
    """The sizes that `anyres` chooses from."""

    unfreeze_mm_vision_tower: bool = False
    """Whether the tower was trained, and is therefore part of the checkpoint."""

    conversation_template: str | None = None
    """Name of the prompt template that the model was trained with."""

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: also the older names, which LLaVA's own code and SGLang read."""
        content = super().to_diff_dict()
        if content.get("dtype") is not None:
            content["torch_dtype"] = content["dtype"]
        return content | older_rope_fields(content)


def older_rope_fields(content: dict[str, Any]) -> dict[str, Any]:
    """How transformers 4, and what is built on it, names a configuration's `rope_parameters`."""
    rope = content.get("rope_parameters")
    if not rope:
        return {}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    kind = scaling.get("rope_type", "default")
    return {
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": None if kind == "default" else scaling | {"type": kind},
    }
