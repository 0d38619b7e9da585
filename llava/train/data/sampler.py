"""In which order samples are seen: shuffled anew each epoch, by seed and epoch alone.

The order doesn't depend on the number of processes, so a run may be resumed with another number and still has
the same samples in each global batch (with batches of like length too, for as long as `batch_size` is an optimizer
step's).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A permutation of `length` numbers drawn from (seed, epoch).

    With `lengths`, batches of like length: the permutation is cut into blocks of `block_size` (several batches, each of
    an optimizer step), each is sorted by length and its batches of `batch_size` are shuffled. With `is_image` too, each
    batch holds samples of one kind (the left over ones of both kinds come last, mixed).
    """

    def __init__(
        self,
        length: int,
        seed: int,
        *,
        lengths: Sequence[int] | np.ndarray | None = None,
        is_image: Sequence[bool] | np.ndarray | None = None,
        batch_size: int = 1,
        blocks: int = 50,
        shuffle: bool = True,
    ):
        self.length = length
        self.seed = seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.is_image = None if is_image is None else np.asarray(is_image, dtype=bool)
        self.batch_size = batch_size
        self.block_size = batch_size * blocks
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).tolist())

    def order(self, epoch: int) -> np.ndarray:
        """The numbers in the order of `epoch`, int64 [length]."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self.length) if self.shuffle else np.arange(self.length)
        if self.lengths is None:
            return order
        if self.is_image is None:
            full, rest = self._batches(order, self.lengths)
        else:
            images, image_rest = self._batches(order[self.is_image[order]], self.lengths)
            texts, text_rest = self._batches(order[~self.is_image[order]], self.lengths)
            full = images + texts
            rest = np.concatenate([image_rest, text_rest])
        positions = random.permutation(len(full))
        return np.concatenate([*(full[position] for position in positions), rest]).astype(np.int64)

    def _batches(self, order: np.ndarray, lengths: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Full batches of like length, and what is left over."""
        batches: list[np.ndarray] = []
        whole = len(order) // self.batch_size * self.batch_size
        for start in range(0, whole, self.block_size):
            block = order[start : min(start + self.block_size, whole)]
            block = block[np.argsort(-lengths[block], kind="stable")]
            batches.extend(np.split(block, len(block) // self.batch_size))
        return batches, order[whole:]
