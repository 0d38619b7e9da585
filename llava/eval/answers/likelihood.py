"""How likely a model finds each of several answers to a question: what multiple-choice scores by likelihood rest on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation
from llava.images import open_image
from llava.tokenization import ImageTokens, encode_conversation, pad_batch


class Likelihood(NamedTuple):
    """Log probability of an answer from the first token on that tells it from the others, and how many tokens."""

    log_probability: float
    tokens: int


@dataclass(frozen=True)
class _Candidate:
    question: int
    images: Sequence[Any]
    input_ids: np.ndarray
    """int64 [length], expanded."""
    labels: np.ndarray
    start: int
    """Where the question's candidates begin to differ."""


@torch.inference_mode()
def answer_likelihoods(
    loaded: Any,
    template: Conversation,
    asked: Sequence[tuple[list[dict[str, str]], Sequence[Any], Sequence[str]]],
    batch_size: int = 32,
) -> list[list[Likelihood]]:
    """The likelihood of each answer to each question, end mark included.

    Args:
        loaded: a `llava.model.LoadedModel`.
        asked: per question its turns (`{"from", "value"}`, the last one the question), its images (whatever
            `open_image` takes) and at least two different answers.
    """
    tokenizer, model, _, _ = loaded
    image_tokens = ImageTokens.from_config(model.config, tokenizer)
    candidates: list[_Candidate] = []
    for number, (turns, images, answers) in enumerate(asked):
        encoded = [
            encode_conversation(
                [*turns, {"from": "gpt", "value": answer}],
                template,
                tokenizer,
                image_tokens,
                features_per_image=[model.num_patches] * len(images),
            )
            for answer in answers
        ]
        start = _common_length([one.input_ids for one in encoded])
        candidates += [
            _Candidate(number, images, np.array(one.input_ids), np.array(one.labels), start) for one in encoded
        ]
    found: list[list[Likelihood]] = [[] for _ in asked]
    for place in range(0, len(candidates), batch_size):
        batch = candidates[place : place + batch_size]
        for candidate, likelihood in zip(batch, _likelihoods(loaded, batch), strict=True):
            found[candidate.question].append(likelihood)
    return found


def _likelihoods(loaded: Any, batch: Sequence[_Candidate]) -> list[Likelihood]:
    tokenizer, model, processor, _ = loaded
    device = model.device
    samples = [(candidate.input_ids, candidate.labels) for candidate in batch]
    padded = pad_batch(samples, tokenizer.pad_token_id or 0, side="left")
    images = [open_image(image) for candidate in batch for image in candidate.images]
    pixels = torch.from_numpy(processor(images, model.config.image_aspect_ratio)).to(device) if images else None
    # Padded on the left, all answers end at the last position; each token is predicted one position before it.
    kept = max(len(candidate.input_ids) - candidate.start for candidate in batch)
    logits = model(
        input_ids=torch.from_numpy(padded["input_ids"]).to(device),
        attention_mask=torch.from_numpy(padded["attention_mask"]).long().to(device),
        pixel_values=pixels,
        logits_to_keep=kept + 1,
    ).logits[:, :-1]
    labels = padded["labels"][:, -kept:].copy()
    for row, candidate in enumerate(batch):
        labels[row, : kept - (len(candidate.input_ids) - candidate.start)] = IGNORE_INDEX
    targets = torch.from_numpy(labels).to(device)
    losses = torch.nn.functional.cross_entropy(
        logits.double().transpose(1, 2),  # [batch, vocabulary, length]
        targets,
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    counts = (targets != IGNORE_INDEX).sum(dim=1)
    return [Likelihood(-loss, int(count)) for loss, count in zip(losses.sum(dim=1).tolist(), counts.tolist())]


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading ids all sequences share."""
    shared = 0
    for ids in zip(*sequences):
        if len(set(ids)) > 1:
            break
        shared += 1
    return shared
