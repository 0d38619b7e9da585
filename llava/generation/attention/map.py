"""Where a model looked when it made each token of an answer: attention's weights over the patches of its images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava.generation.detokenize import Detokenizer, TextStream
from llava.generation.image_features import ImageEncoder
from llava.generation.prompts import Prompt


@dataclass
class View:
    """One image, or one tile of it, as the vision tower saw it."""

    number: int
    """Which of the request's images, from 0."""
    image: Image.Image
    weights: np.ndarray
    """float32 `[tokens, side, side]`: the share of a token's attention that each patch got."""


@dataclass
class AttentionMap:
    """What `Engine.attention_map` found; the shares are averages over all heads and layers."""

    tokens: list[str]
    """The answer's text, cut where its tokens end."""
    shares: np.ndarray
    """float32 `[tokens]`: how much of the attention went to images, the rest went to text."""
    views: list[View]


def read_weights(
    prompt: Prompt, token_ids: Sequence[int], weights: np.ndarray, encoder: ImageEncoder, detokenizer: Detokenizer
) -> AttentionMap:
    """What `Runner.watch` gave for the positions that made `token_ids`, `[tokens, positions]`, put into images."""
    views = [
        View(number, seen, tile)
        for number, (image, (first, last)) in enumerate(zip(prompt.images, prompt.spans, strict=True))
        for seen, tile in zip(encoder.seen(image), _tiles(weights[:, first:last], encoder), strict=True)
    ]
    shares = sum((weights[:, first:last].sum(1) for first, last in prompt.spans), np.zeros(len(weights), np.float32))
    return AttentionMap(_texts(token_ids, detokenizer), shares, views)


def _tiles(weights: np.ndarray, encoder: ImageEncoder) -> Iterator[np.ndarray]:
    """`[tokens, side, side]` for each tile of an image; its class token, where there is one, is left out."""
    tower = encoder.model.get_vision_tower()
    side = tower.patches_per_side
    for start in range(0, weights.shape[1], tower.num_patches):
        patches = weights[:, start : start + tower.num_patches][:, -(side**2) :]
        yield patches.reshape(len(weights), side, side)


def _texts(token_ids: Sequence[int], detokenizer: Detokenizer) -> list[str]:
    """The text that each token adds; that of a character in several tokens is the last one's."""
    stream = TextStream(detokenizer)
    texts = [stream.push([token]) for token in token_ids]
    return [*texts[:-1], texts[-1] + stream.flush()] if texts else []
