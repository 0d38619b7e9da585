"""Keys and values of prompts that were computed before, found again by their beginnings.

A prompt's key is its ids, with a number made of the image's content where an image stands. Two prompts that
begin alike have the same keys and values there: the system text, an image asked about again, the turns so far.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llava.generation.cache.pages import KeptPage

BLOCK = 16
"""Prefixes are looked up in whole blocks of this many positions; a longer match is found by comparing."""


@dataclass(eq=False)
class Prefix:
    """`states` hold, per layer, `[2, kv_heads, len(key), head_dim]`; or they are pages (`KeptPages`)."""

    key: np.ndarray
    states: Sequence[torch.Tensor | KeptPage]
    hashes: list[int] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(state.nbytes for state in self.states)


class PrefixStore:
    """Prefixes up to `max_bytes`, the least recently used ones dropped first. The same one is never there twice."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._prefixes: OrderedDict[int, Prefix] = OrderedDict()
        self._index: dict[int, Prefix] = {}
        self._ends: dict[int, dict[int, Prefix]] = {}
        """By the hash of the last whole block, then by identity."""

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, key: np.ndarray) -> tuple[Prefix | None, int]:
        """The prefix that shares the most with `key` (int64 `[positions]`), and how many positions that is."""
        for block_hash in reversed(_block_hashes(key)):
            prefix = self._index.get(block_hash)
            if prefix is None:
                continue
            common = common_length(key, prefix.key)
            if common >= BLOCK:  # else two hashes are equal by chance
                self._prefixes.move_to_end(id(prefix))
                return prefix, common
        return None, 0

    def holds(self, key: np.ndarray) -> bool:
        """Whether a prefix with this key, or one that goes on from it, is there; it then counts as used."""
        prefix, common = self.find(key)
        if common < len(key):
            same = [other for other in self._ending_in(_block_hashes(key)[-1:]) if np.array_equal(other.key, key)]
            prefix = same[0] if same else None
        if prefix is not None:
            self._prefixes.move_to_end(id(prefix))
        return prefix is not None

    def add(self, key: np.ndarray, states: Sequence[torch.Tensor | KeptPage]) -> Prefix:
        """Keep `states` for `key`, if they fit; returns the prefix, which is usable either way.

        What is kept already and is a beginning of this one, or the same, makes way for it.
        """
        prefix = Prefix(key, states, _block_hashes(key))
        size = prefix.num_bytes
        if not prefix.hashes or size > self.max_bytes:
            return prefix
        for other in self._ending_in(prefix.hashes):
            if common_length(other.key, key) == len(other.key):
                self._drop(other)
        while self._prefixes and self.num_bytes + size > self.max_bytes:
            self.drop_oldest()
        self._prefixes[id(prefix)] = prefix
        self.num_bytes += size
        self._index.update(dict.fromkeys(prefix.hashes, prefix))
        self._ends.setdefault(prefix.hashes[-1], {})[id(prefix)] = prefix
        return prefix

    def drop_oldest(self) -> bool:
        """Give up the least recently used prefix, if there is one."""
        if not self._prefixes:
            return False
        self._drop(next(iter(self._prefixes.values())))
        return True

    def clear(self) -> None:
        self._prefixes.clear()
        self._index.clear()
        self._ends.clear()
        self.num_bytes = 0

    def _ending_in(self, hashes: list[int]) -> list[Prefix]:
        """The prefixes whose last whole block has one of these hashes."""
        return [prefix for block_hash in hashes for prefix in self._ends.get(block_hash, {}).values()]

    def _drop(self, prefix: Prefix) -> None:
        del self._prefixes[id(prefix)]
        self.num_bytes -= prefix.num_bytes
        for block_hash in prefix.hashes:
            if self._index.get(block_hash) is prefix:
                del self._index[block_hash]
        ends = self._ends[prefix.hashes[-1]]
        del ends[id(prefix)]
        if not ends:
            del self._ends[prefix.hashes[-1]]


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many positions two keys share from the start."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    place = int(differs.argmax()) if length else 0
    return place if length and differs[place] else length


def _block_hashes(key: np.ndarray) -> list[int]:
    """A number for each whole block, made of it and of all before it."""
    content = np.ascontiguousarray(key, np.int64).tobytes()
    size = BLOCK * 8
    hashes, last = [], 0
    for start in range(0, len(content) - size + 1, size):
        last = hash((last, content[start : start + size]))
        hashes.append(last)
    return hashes
