"""A projector to start from, by least squares: for data too small to learn one from nothing by gradient.

The last layer is solved so that every patch of an image comes near the words of its records: the mean of their input
embeddings, a word counting the more the fewer images have it. The layers before it stay as drawn, scaled to the mean
and deviation of the tower's features. So a language model finds an image's words where its patches stand, from the
first step of training on (`--fit_projector`).
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError
from llava.record_content import ASSISTANT, read_turns
from llava.train.data.dataset import LlavaDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava.model import LoadedModel
    from llava.train.data.feature_cache import FeatureCache

logger = logging.getLogger(__name__)

_BLOCK = 64
"""Images at a time."""
_SHARED = 0.8
"""Of what all images' words have in common, the part that is taken away."""
_RIDGE = 10
"""Images' worth of features without words that the solution is drawn to."""


def fit_projector(loaded: "LoadedModel", dataset: LlavaDataset, cache: "FeatureCache | None") -> float:
    """Fit the projector of a model to the records of `dataset`, whose images' features are in `cache`.

    Returns the share of the images whose own words are nearer to their projected features than any other image's.

    Raises:
        LlavaError: no images, words that don't tell images apart, or a projector without weights.
    """
    if cache is None:
        raise LlavaError(f"--fit_projector: no record of {dataset.store.path} has an image")
    embedding = loaded.model.get_input_embeddings().weight.detach()
    images = words_of_images(dataset, cache)
    targets, words = word_targets(list(images.values()), loaded.tokenizer, embedding)
    features = Features(cache, list(images))
    found = solve(loaded.model.get_model().mm_projector, features, targets, _length(embedding))
    logger.info(
        "projector fitted to %d images and %d words: for %.1f %% of the images their own words are the nearest",
        *(len(images), words, 100 * found),
    )
    return found


def solve(projector: nn.Module, features: "Features", targets: torch.Tensor, length: float) -> float:
    """Set the weights of a projector (`linear` or `mlpNx_gelu`) in place; returns the share of images told apart.

    Args:
        targets: what the patches of each image are to come near, `[images, hidden]`, in the order of the features.
        length: mean length of a projected patch.

    Raises:
        LlavaError: a projector without weights.
    """
    layers = list(projector) if isinstance(projector, nn.Sequential) else [projector]
    first, last = layers[0], layers[-1]
    if not isinstance(first, nn.Linear) or not isinstance(last, nn.Linear):
        raise LlavaError("--mm_projector_type identity has no weights to fit; use linear or mlp2x_gelu")
    before = nn.Sequential(*layers[:-1])
    dtype = first.weight.dtype
    projector.float()
    with torch.no_grad():
        if first is not last:
            _standardise(first, *features.mean_and_deviation())
        gram, product = _sums(before, features, targets)
        gram += _RIDGE / len(targets) * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        solved = torch.linalg.solve(gram, product)
        last.weight.copy_(solved[:-1].T)
        last.bias.copy_(solved[-1])
        ends = [(seen.norm(dim=-1).mean(1), seen.mean(1)) for seen in map(projector, features)]
        lengths, means = (torch.cat(each) for each in zip(*ends, strict=True))
        scale = length / float(lengths.mean())
        last.weight.mul_(scale)
        last.bias.mul_(scale)
    projector.to(dtype)
    nearest = _directions(means) @ _directions(targets).T
    return float((nearest.argmax(1) == torch.arange(len(targets))).float().mean())


class Features:
    """Tower features of images, `[n, patches, mm_hidden]` float32 a block; read again at each pass."""

    def __init__(self, cache: "FeatureCache", rows: list[int]):
        self.cache, self.rows = cache, rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.rows), _BLOCK):
            yield self.cache.take(self.rows[start : start + _BLOCK]).float()

    def mean_and_deviation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each of the features over all patches of all images, `[mm_hidden]` each."""
        count = sum(block[..., 0].numel() for block in self)
        mean = torch.stack([block.double().sum((0, 1)) for block in self]).sum(0) / count
        squares = [(block.double() - mean).square().sum((0, 1)) for block in self]
        return mean.float(), (torch.stack(squares).sum(0) / count).sqrt().float()


def word_targets(
    words: list[Counter[str]], tokenizer: "PreTrainedTokenizerBase", embedding: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Where the patches of each image are to go, `[images, hidden]` as long as an embedding; and how many words count.

    Args:
        words: of each image, with how often it stands there. Those of more than half of the images tell nothing.
        embedding: the language model's input embedding, `[vocabulary, hidden]`.

    Raises:
        LlavaError: images whose words all stand with more than half of the images, or without words.
    """
    having = Counter(word for own in words for word in own)
    kept = {word: math.log(len(words) / number) for word, number in having.items() if number <= len(words) / 2}
    known = {word: embedding[_ids(tokenizer, word)].float().mean(0) for word in kept}
    empty = sum(not any(word in kept for word in own) for own in words)
    if empty:
        raise LlavaError(
            f"{empty} of {len(words)} images have no word of their own (of {len(having)}, each stands with more than "
            "half of the images); give records that tell images apart, or train stage 1 by steps"
        )
    sums = [
        torch.stack([kept[word] * math.sqrt(number) * known[word] for word, number in own.items() if word in kept])
        for own in words
    ]
    directions = nn.functional.normalize(torch.stack([rows.sum(0) for rows in sums]), dim=1)
    own = nn.functional.normalize(directions - _SHARED * directions.mean(0), dim=1)
    return own * _length(embedding), len(kept)


def words_of_images(dataset: LlavaDataset, cache: "FeatureCache") -> dict[int, Counter[str]]:
    """{row of an image in the cache: how often words stand in its records}; those of answers count twice."""
    found: dict[int, Counter[str]] = {}
    for index in range(len(dataset)):
        said: Counter[str] = Counter()
        for turn in read_turns(dataset.store[int(dataset.numbers[index])]):
            plain = turn.text.replace(DEFAULT_IMAGE_TOKEN, " ").lower()
            for word in re.findall(r"\w+", plain):
                said[word] += 2 if turn.role == ASSISTANT else 1
        for image in dataset.sample(index).images:
            found.setdefault(cache.row(image), Counter()).update(said)
    return found


def _standardise(layer: nn.Linear, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Draw a layer whose outputs have mean 0 and deviation 1 over what has this mean and deviation."""
    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    # What never changes tells nothing.
    layer.weight.div_(deviation.clamp(min=max(1e-3 * float(deviation.max()), 1e-6)))
    layer.bias.copy_(-layer.weight @ mean)


def _sums(before: nn.Module, features: Features, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of what the last layer sees (and a 1, for its bias) with itself and with the targets, float64."""
    gram = product = torch.zeros(())
    start = 0
    for block in features:
        seen = before(block).double()
        seen = torch.cat([seen, torch.ones_like(seen[..., :1])], -1)
        wanted = targets[start : start + len(block)].double()
        gram = gram + torch.einsum("npi,npj->ij", seen, seen)
        product = product + torch.einsum("npi,nj->ij", seen, wanted)
        start += len(block)
    return gram, product


def _directions(rows: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(rows - rows.mean(0), dim=1)


def _length(embedding: torch.Tensor) -> float:
    return float(embedding.float().norm(dim=1).mean())


def _ids(tokenizer: "PreTrainedTokenizerBase", word: str) -> list[int]:
    return tokenizer(" " + word, add_special_tokens=False)["input_ids"]
