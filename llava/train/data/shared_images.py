"""Records of one image behind one copy of it: in a packed batch its positions are computed once for all of them.

Samples of the same images whose ids are equal up to the end of the last image are joined: first what they share, then
the rest of each, a branch. A branch sees what is shared and itself, at the positions that it has alone, so losses and
gradients are those of the samples one by one; only tokens are saved. To attention a branch is a sequence whose keys
begin elsewhere, at what is shared (`seen_by`).
"""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.record_content import image_key
from llava.train.data.dataset import LlavaDataset, Sample


def shared_length(sample: Sample) -> int:
    """Tokens up to the end of the last image; 0 if there is none, or if a token up to the next one is a target."""
    places = np.flatnonzero(sample.input_ids == IMAGE_TOKEN_INDEX)
    if not len(places) or places[-1] + 1 == len(sample.input_ids):
        return 0
    length = int(places[-1]) + 1
    # The first token of a branch follows another sample's in the batch, so it can't be a target.
    return length if (sample.labels[: length + 1] == IGNORE_INDEX).all() else 0


def joinable(samples: Iterable[Sample | None]) -> list[tuple[list[int], int]]:
    """(places of samples that may be joined, tokens that they share), in order of their first; one that shares nothing
    is alone, with 0."""
    found: dict[Any, tuple[list[int], int]] = {}
    for place, sample in enumerate(samples):
        length = 0 if sample is None else shared_length(sample)
        if sample is not None and length:
            # A digest: an image's positions take two kilobytes, of each image of the data.
            digest = blake2b(sample.input_ids[:length].tobytes(), digest_size=16).digest()
            beginning: Any = (digest, *map(image_key, sample.images))
        else:
            beginning = place
        found.setdefault(beginning, ([], length))[0].append(place)
    return list(found.values())


def groups_of_one_image(dataset: LlavaDataset, most: int, seed: int) -> tuple[list[list[int]], np.ndarray]:
    """Numbers of samples that are joined, at most `most` each, drawn by `seed`, and the lengths, int [groups]."""
    if most == 1:
        return [[number] for number in range(len(dataset))], dataset.lengths()
    random = np.random.default_rng([seed, len(dataset)])
    groups: list[list[int]] = []
    saved: list[int] = []
    for members, shared in joinable(map(dataset.sample_if_readable, range(len(dataset)))):
        order = random.permutation(members).tolist()
        cut = [order[start : start + most] for start in range(0, len(order), most)]
        groups += cut
        saved += [shared * (len(group) - 1) for group in cut]
    lengths = dataset.lengths()
    return groups, np.array([lengths[group].sum() for group in groups], np.int64) - np.array(saved, np.int64)


class Joined(NamedTuple):
    """Samples that share their beginning: ids and labels, int32, and positions, int64, that each sample has alone, all
    [tokens]; how many tokens are shared, then how many each branch has."""

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    lengths: list[int]


def join(samples: list[Sample], shared: int = 0) -> Joined:
    """Samples that `joinable` put together, as one; `shared` is what it says of them, and nothing for one alone."""
    if len(samples) == 1:
        shared = len(samples[0].input_ids)
    rests = [np.arange(shared, len(sample.input_ids)) for sample in samples]
    ids = [samples[0].input_ids[:shared], *(sample.input_ids[shared:] for sample in samples)]
    labels = [samples[0].labels[:shared], *(sample.labels[shared:] for sample in samples)]
    lengths = [len(part) for part in ids if len(part)]
    return Joined(np.concatenate(ids), np.concatenate(labels), np.concatenate([np.arange(shared), *rests]), lengths)


def seen_by(lengths: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """What is seen by each part of joined samples that follow each other, by their lengths (`Joined`).

    Returns:
        How many tokens each part sees, [parts]; which they are, one part after the other, int64.
    """
    counts: list[int] = []
    places: list[np.ndarray] = []
    start = 0
    for shared, *branches in lengths:
        counts.append(shared)
        places.append(np.arange(start, start + shared))
        end = start + shared
        for branch in branches:
            counts.append(shared + branch)
            places += [np.arange(start, start + shared), np.arange(end, end + branch)]
            end += branch
        start = end
    return np.array(counts), np.concatenate(places)
