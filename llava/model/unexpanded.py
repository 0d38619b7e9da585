"""LLaVA's way to call a model: ids with one IMAGE_TOKEN_INDEX for each image, and `images` beside them.

The model takes expanded ids (llava.model.language_model). What tools written for LLaVA give becomes those here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import LlavaError, amount
from llava.tokenization import expand_images, pad_batch

Images = torch.Tensor | Sequence[torch.Tensor]


class ExpandedBatch(NamedTuple):
    """Inputs of `LlavaForCausalLM.forward`, each `[batch, positions]` but for the pixel values."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None
    pixel_values: torch.Tensor | None
    """`[n, 3, H, W]`, in reading order."""


def expand_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    images: Images | None,
    features_per_tile: int,
    side: str,
) -> ExpandedBatch:
    """Expand each image's place to its features and pad the rows anew, on `side`.

    Args:
        input_ids: int64 `[batch, length]`, one IMAGE_TOKEN_INDEX per image; rows may have different numbers of them.
        attention_mask: `[batch, length]`; only padding at a row's ends is taken off. A 0 between real tokens (a typed
            `<unk>` where that is the padding id) hides nothing.
        images: `[n, 3, H, W]`, or a list of `[3, H, W]` or `[tiles, 3, H, W]`, or `[n, tiles, 3, H, W]`; in reading
            order. Rows without an image may have one all the same, as LLaVA's own batches do: it isn't used.

    Raises:
        LlavaError: images and their places differ in number.
    """
    rows = input_ids.cpu().numpy()
    mask = np.ones(rows.shape, bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
    spans = [_real(row) for row in mask]
    places = [int((row[span] == IMAGE_TOKEN_INDEX).sum()) for row, span in zip(rows, spans, strict=True)]
    tiles = _used([] if images is None else _tiles(images), places)
    features = [len(tile) * features_per_tile for tile in tiles]
    targets = np.full(rows.shape, IGNORE_INDEX) if labels is None else labels.cpu().numpy()
    samples, first = [], 0
    for row, target, span, count in zip(rows, targets, spans, places, strict=True):
        ids, expanded = expand_images(row[span], target[span], features[first : first + count])
        # LLaVA never learns at an image's place, whatever its label.
        samples.append((ids, np.where(ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX, expanded)))
        first += count
    batch = {name: torch.from_numpy(array) for name, array in pad_batch(samples, 0, side=side).items()}
    device = input_ids.device
    return ExpandedBatch(
        batch["input_ids"].to(device),
        batch["attention_mask"].to(device, torch.long),
        None if labels is None else batch["labels"].to(device),
        torch.cat(tiles) if tiles else None,
    )


def _real(mask: np.ndarray) -> slice:
    """From the first to the last real position of a row."""
    real = np.flatnonzero(mask)
    return slice(real[0], real[-1] + 1) if len(real) else slice(0, 0)


def _tiles(images: Images) -> list[torch.Tensor]:
    """`[tiles, 3, H, W]` of each image."""
    return [image if image.ndim == 4 else image[None] for image in images]


def _used(images: list[torch.Tensor], places: list[int]) -> list[torch.Tensor]:
    """The images that have a place, in reading order."""
    if len(images) == sum(places):
        return images
    if len(images) != sum(max(count, 1) for count in places):
        raise LlavaError(
            f"the ids have {sum(places)} places for images (id {IMAGE_TOKEN_INDEX}) for "
            f"{amount(len(images), 'image')}; each image needs its place"
        )
    owners = [count > 0 for count in places for _ in range(max(count, 1))]
    return [image for image, is_used in zip(images, owners, strict=True) if is_used]
