"""How likely a model finds each of several answers to a question: what multiple-choice scores by likelihood rest on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation
from llava.generation import Engine
from llava.generation.image_features import RequestImage
from llava.tokenization import ImageTokens, encode_conversation, pad_batch


class Likelihood(NamedTuple):
    """Log probability of an answer from the first token on that tells it from the others, and how many tokens."""

    log_probability: float
    tokens: int


@dataclass(frozen=True)
class _Candidate:
    question: int
    images: Sequence[RequestImage]
    input_ids: np.ndarray
    """int64 [length], expanded."""
    labels: np.ndarray
    start: int
    """Where the question's candidates begin to differ."""


@torch.inference_mode()
def answer_likelihoods(
    engine: Engine,
    template: Conversation,
    asked: Sequence[tuple[list[dict[str, str]], Sequence[Any], Sequence[str]]],
    batch_size: int = 32,
) -> list[list[Likelihood]]:
    """The likelihood of each answer to each question, end mark included.

    Args:
        engine: its model, and the features of images that it keeps.
        asked: per question its turns (`{"from", "value"}`, the last one the question), its images (whatever
            `open_image` takes) and at least two different answers.
    """
    image_tokens = ImageTokens.from_config(engine.model.config, engine.tokenizer)
    candidates: list[_Candidate] = []
    for number, (turns, sources, answers) in enumerate(asked):
        images = [engine.encoder.identify(source) for source in sources]
        encoded = [
            encode_conversation(
                [*turns, {"from": "gpt", "value": answer}],
                template,
                engine.tokenizer,
                image_tokens,
                features_per_image=[engine.encoder.num_positions(image) for image in images],
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
        for candidate, likelihood in zip(batch, _likelihoods(engine, batch), strict=True):
            found[candidate.question].append(likelihood)
    return found


def last_logits(
    engine: Engine, sequences: Sequence[np.ndarray], images: Sequence[RequestImage], kept: int
) -> torch.Tensor:
    """float64 `[batch, kept, vocabulary]`: the logits at the last `kept` positions of each of several sequences.

    Args:
        sequences: ids, int64 `[length]`, with IMAGE_TOKEN_INDEX at each position of an image.
        images: those of all sequences in their order.
    """
    model: Any = engine.model
    padded = pad_batch([(ids, ids) for ids in sequences], engine.tokenizer.pad_token_id or 0, side="left")
    features = engine.encoder.features(images)
    logits: torch.Tensor = model(
        input_ids=torch.from_numpy(padded["input_ids"]).to(model.device),
        attention_mask=torch.from_numpy(padded["attention_mask"]).long().to(model.device),
        image_features=torch.cat(features) if features else None,
        logits_to_keep=kept,
    ).logits
    return logits.double()


def _likelihoods(engine: Engine, batch: Sequence[_Candidate]) -> list[Likelihood]:
    # Padded on the left, all answers end at the last position; each token is predicted one position before it.
    kept = max(len(candidate.input_ids) - candidate.start for candidate in batch)
    images = [image for candidate in batch for image in candidate.images]
    logits = last_logits(engine, [candidate.input_ids for candidate in batch], images, kept + 1)[:, :-1]
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
