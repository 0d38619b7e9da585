"""LLaVA's helpers around images and prompts, over this package's own functions, for tools written for LLaVA."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.folders import model_name
from llava.images import ImageProcessor, open_uploaded_image
from llava.images.anyres import best_pinpoint, read_pinpoints
from llava.images.modes import pad_to_square
from llava.tokenization import tokenize_prompt

_BYTES_BEYOND = 8
"""Tokens looked at beyond a keyword's bytes: a token has at least one byte, special ones have none."""


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Pixel values as the model's config wants them, float32.

    Args:
        image_processor: this package's, or one of transformers'.
        model_cfg: anything with `image_aspect_ratio` (and, for `anyres`, `image_grid_pinpoints`), or without.

    Returns:
        `[n, 3, H, W]`; a list of `[3, H, W]` for `keep`, of `[tiles, 3, H, W]` for `anyres`.
    """
    pixels = _own(image_processor)(
        images, getattr(model_cfg, "image_aspect_ratio", None), getattr(model_cfg, "image_grid_pinpoints", None)
    )
    if isinstance(pixels, list):
        return [torch.from_numpy(one) for one in pixels]
    return torch.from_numpy(pixels)


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: Any) -> torch.Tensor:
    """`[tiles, 3, H, W]`: the whole image, then the tiles of the best grid."""
    return torch.from_numpy(_own(processor)([image], "anyres", grid_pinpoints)[0])


def select_best_resolution(original_size: tuple[int, int], possible_resolutions: Any) -> tuple[int, int]:
    """Of (width, height) pairs the one that keeps most of an image of `original_size` and wastes least."""
    return best_pinpoint(*original_size, read_pinpoints(possible_resolutions))


def expand2square(pil_img: Image.Image, background_color: Any) -> Image.Image:
    """The image in the middle of a square of `background_color`."""
    return pad_to_square(pil_img, background_color)


def load_image_from_base64(image: str) -> Image.Image:
    """An image in base64 or a data: URL, as RGB."""
    return open_uploaded_image(image)


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Ids of a prompt, BOS once, `image_token_index` for each `<image>`: a list, or int64 `[length]` with "pt"."""
    ids = tokenize_prompt(prompt, tokenizer)
    if image_token_index != IMAGE_TOKEN_INDEX:
        ids = [image_token_index if token == IMAGE_TOKEN_INDEX else token for token in ids]
    if return_tensors not in (None, "pt"):
        raise LlavaError(f'return_tensors may be "pt" or None, not {return_tensors!r}')
    return torch.tensor(ids, dtype=torch.long) if return_tensors else ids


def get_model_name_from_path(model_path: str) -> str:
    """A folder's or hub id's last part; of a run's `checkpoint-N` with the run's name before it."""
    return model_name(model_path)


class KeywordsStoppingCriteria(StoppingCriteria):
    """Ends a row's answer once its new text holds one of `keywords`; for `model.generate(stopping_criteria=[...])`.

    `input_ids` `[batch, length]` are the prompt's: where `generate` gives them back, they aren't searched.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor):
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt = input_ids
        self.tail = max((len(keyword.encode()) for keyword in self.keywords), default=0) + _BYTES_BEYOND

    def __call__(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> Any:
        """Bool `[batch]`: whose answer is over."""
        length = self.prompt.shape[1]
        start = length if torch.equal(output_ids[:, :length].to(self.prompt), self.prompt) else 0
        new = output_ids[:, max(start, output_ids.shape[1] - self.tail) :]
        found = []
        for row in new:
            # Some keywords are special tokens (</s>), and leaving those out may join what they kept apart.
            text = self.tokenizer.decode(row, skip_special_tokens=False)
            found.append(any(keyword in text for keyword in self.keywords))
        return torch.tensor(found, device=output_ids.device)


def _own(image_processor: Any) -> ImageProcessor:
    if isinstance(image_processor, ImageProcessor):
        return image_processor
    return ImageProcessor.from_pretrained(image_processor.to_dict())
