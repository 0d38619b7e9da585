"""Training samples in v0's format (`### Human: …`), ids and labels as the reference makes them.

What is a target follows the reference's arithmetic, which the released v0 checkpoints were trained with: each
turn's length is that of the turn tokenised alone, BOS included, and the lengths are added up. So each border lies
one position later than the one before, and of each human turn the first two positions stay targets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.record_content import USER, Turn
from llava.tokenization.batches import expand_images
from llava.tokenization.encoder import tokenize_prompt
from llava.tokenization.image_tokens import ImageTokens

_MARK = "### "


def encode_hash_sample(
    turns: Sequence[Turn],
    template: Conversation,
    tokenizer: Any,
    image_tokens: ImageTokens,
    features_per_image: int | Sequence[int] = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels), int64 [length], each image as many positions as `features_per_image` says.

    The template's examples take no part; its system text and roles do.
    """
    header = f"{template.system}\n\n"
    pieces = [f"{_MARK}{template.roles[turn.role]}: {template.place_images(turn.text)}\n" for turn in turns]
    ids = tokenize_prompt("".join([header, *pieces, _MARK]), tokenizer, image_tokens)
    features = _per_image(features_per_image, ids.count(IMAGE_TOKEN_INDEX))
    input_ids, _ = expand_images(ids, None, features)
    labels = input_ids.copy()
    start = len(tokenize_prompt(header, tokenizer, image_tokens))
    labels[:start] = IGNORE_INDEX
    for turn, piece in zip(turns, pieces):
        alone = tokenize_prompt(piece, tokenizer, image_tokens)
        own, features = features[: alone.count(IMAGE_TOKEN_INDEX)], features[alone.count(IMAGE_TOKEN_INDEX) :]
        length = len(alone) + sum(own) - len(own)
        if turn.role == USER:
            labels[start + 2 : start + length] = IGNORE_INDEX
        start += length
    labels[input_ids == IMAGE_TOKEN_INDEX] = IGNORE_INDEX
    return input_ids, labels


def _per_image(features: int | Sequence[int], images: int) -> list[int]:
    return [features] * images if isinstance(features, int) else list(features)
