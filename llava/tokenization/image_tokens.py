"""How an image stands in the text of a prompt: LLaVA's one placeholder, or v1.0's run of <im_patch>."""

from dataclasses import dataclass
from typing import Any

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    SCHEME_PATCH,
    SCHEME_PLACEHOLDER,
)
from llava.errors import LlavaError

SCHEMES = (SCHEME_PLACEHOLDER, SCHEME_PATCH)


@dataclass(frozen=True)
class ImageTokens:
    """`placeholder`: the text is tokenised on both sides of `<image>` apart (LLaVA, LLaVA-Med v1.5, BabyDoctor).
    `patch`: `<image>` becomes the token `<im_patch>` and the text is tokenised in one piece (LLaVA-Med v1.0).

    In the ids both are one IMAGE_TOKEN_INDEX per image, and `expand_images` makes as many as there are features.
    """

    scheme: str = SCHEME_PLACEHOLDER
    use_start_end: bool = False
    """Whether `<im_start>` and `<im_end>` stand around each image."""

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise LlavaError(f'unknown image-token scheme "{self.scheme}"; one of {", ".join(SCHEMES)}')

    @classmethod
    def from_config(cls, config: Any, tokenizer: Any = None) -> "ImageTokens":
        """The scheme of a model's config (`mm_image_token_scheme`, `mm_use_im_start_end`).

        Raises:
            LlavaError: the tokenizer lacks a token that the scheme needs.
        """
        scheme = getattr(config, "mm_image_token_scheme", None) or SCHEME_PLACEHOLDER
        image_tokens = cls(scheme, bool(getattr(config, "mm_use_im_start_end", False)))
        if tokenizer is not None:
            image_tokens.check(tokenizer)
        return image_tokens

    @property
    def needed(self) -> list[str]:
        """The tokens that a tokenizer must have for this scheme."""
        patch = [DEFAULT_IMAGE_PATCH_TOKEN] if self.scheme == SCHEME_PATCH else []
        return patch + ([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if self.use_start_end else [])

    @property
    def text(self) -> str:
        """What stands in the text for one `<image>`."""
        inner = DEFAULT_IMAGE_PATCH_TOKEN if self.scheme == SCHEME_PATCH else DEFAULT_IMAGE_TOKEN
        return f"{DEFAULT_IM_START_TOKEN}{inner}{DEFAULT_IM_END_TOKEN}" if self.use_start_end else inner

    def check(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in self.needed if token not in vocabulary]
        if missing:
            raise LlavaError(
                f"the tokenizer has no {' and no '.join(missing)}, which the model's config asks for "
                f"(mm_image_token_scheme={self.scheme}, mm_use_im_start_end={self.use_start_end}); "
                f"use the tokenizer that was saved with this model"
            )
