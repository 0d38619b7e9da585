"""How sure a model is of yes against no: the probabilities of the token that tells the two words apart."""

from collections.abc import Sequence
from typing import Any

import torch

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation
from llava.errors import LlavaError
from llava.images import open_image
from llava.tokenization import (
    ImageTokens,
    conversation_from_record,
    encode_conversation,
    encode_prompt,
    expand_images,
    pad_batch,
)

YES, NO = ("yes", "Yes"), ("no", "No")


@torch.inference_mode()
def yes_probabilities(
    loaded: Any,
    template: Conversation,
    asked: Sequence[tuple[list[dict[str, str]], Sequence[Any]]],
    batch_size: int = 32,
) -> list[float]:
    """P(yes) / (P(yes) + P(no)) of each question, over both ways of writing each word.

    Args:
        loaded: a `llava.model.LoadedModel`.
        asked: per question its turns (`{"from", "value"}`, the last one the question) and its images (whatever
            `open_image` takes).

    Raises:
        LlavaError: the tokenizer doesn't tell the words apart by a token.
    """
    if not asked:
        return []
    tokenizer, model, processor, _ = loaded
    image_tokens = ImageTokens.from_config(model.config, tokenizer)
    opening, yes, no = _answer_tokens(template, tokenizer, image_tokens)
    chances = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        encoded = []
        for turns, images in batch:
            prompt = conversation_from_record(turns, template)
            unexpanded = encode_prompt(prompt, tokenizer, image_tokens) + opening
            ids, _ = expand_images(unexpanded, None, [model.num_patches] * len(images))
            encoded.append((ids, ids))
        padded = pad_batch(encoded, tokenizer.pad_token_id or 0, side="left")
        opened = [open_image(image) for _, images in batch for image in images]
        pixels = torch.from_numpy(processor(opened, model.config.image_aspect_ratio)) if opened else None
        device = model.device
        logits = model(
            input_ids=torch.from_numpy(padded["input_ids"]).to(device),
            attention_mask=torch.from_numpy(padded["attention_mask"]).long().to(device),
            pixel_values=None if pixels is None else pixels.to(device),
            logits_to_keep=1,
        ).logits[:, -1]
        logs = torch.log_softmax(logits.double(), dim=-1)
        said_yes, said_no = (torch.logsumexp(logs[:, sorted(tokens)], dim=1) for tokens in (yes, no))
        chances += torch.sigmoid(said_yes - said_no).tolist()
    return chances


def _answer_tokens(template, tokenizer, image_tokens) -> tuple[list[int], set[int], set[int]]:
    """(ids that every answer word begins with, the next ids of yes, those of no).

    Many tokenizers have a token for each word, others begin all of them with a blank.
    """
    words = {word: _target_ids(word, template, tokenizer, image_tokens) for word in (*YES, *NO)}
    length = 0
    while len({ids[length] if length < len(ids) else None for ids in words.values()}) == 1:
        length += 1
    yes, no = ({words[word][length] for word in group if length < len(words[word])} for group in (YES, NO))
    if not yes or not no or yes & no:
        raise LlavaError("this tokenizer doesn't tell yes from no by a token; --yes-no-probabilities can't work")
    return words[YES[0]][:length], yes, no


def _target_ids(word: str, template: Conversation, tokenizer: Any, image_tokens: ImageTokens) -> list[int]:
    """The ids that training would have the model say if `word` were the answer, end mark included."""
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": word}]
    labels = encode_conversation(turns, template, tokenizer, image_tokens).labels
    return [label for label in labels if label != IGNORE_INDEX]
