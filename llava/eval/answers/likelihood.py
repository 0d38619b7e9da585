"""How likely a model finds each of several answers to a question: what multiple-choice scores by likelihood rest on."""

from collections.abc import Iterable, Sequence
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


def last_logits(loaded: Any, sequences: Sequence[np.ndarray], images: Iterable[Any], kept: int) -> torch.Tensor:
    """float64 `[batch, kept, vocabulary]`: the logits at the last `kept` positions of each of several sequences.

    Args:
        loaded: a `llava.model.LoadedModel`.
        sequences: ids, int64 `[length]`, with IMAGE_TOKEN_INDEX at each position of an image.
        images: those of all sequences in their order, whatever `open_image` takes.
    """
    tokenizer, model, processor, _ = loaded
    padded = pad_batch([(ids, ids) for ids in sequences], tokenizer.pad_token_id or 0, side="left")
    opened = [open_image(image) for image in images]
    pixels = torch.from_numpy(processor(opened, model.config.image_aspect_ratio)) if opened else None
    logits: torch.Tensor = model(
        input_ids=torch.from_numpy(padded["input_ids"]).to(model.device),
        attention_mask=torch.from_numpy(padded["attention_mask"]).long().to(model.device),
        pixel_values=None if pixels is None else pixels.to(model.device),
        logits_to_keep=kept,
    ).logits
    return logits.double()


def _likelihoods(loaded: Any, batch: Sequence[_Candidate]) -> list[Likelihood]:
    # Padded on the left, all answers end at the last position; each token is predicted one position before it.
    kept = max(len(candidate.input_ids) - candidate.start for candidate in batch)
    images = [image for candidate in batch for image in candidate.images]
    logits = last_logits(loaded, [candidate.input_ids for candidate in batch], images, kept + 1)[:, :-1]
    labels = np.full((len(batch), kept), IGNORE_INDEX)
    for row, candidate in zip(labels, batch, strict=True):
        own = candidate.labels[candidate.start :]
        row[kept - len(own) :] = own
    targets = torch.from_numpy(labels).to(logits.device)
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2),  # [batch, vocabulary, length]
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
