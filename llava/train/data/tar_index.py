"""Where each member of many tar files lies: 40 bytes a member in a memory-mapped file, whatever the shards hold."""

import hashlib
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from llava.bars import tqdm
from llava.errors import LlavaError, amount, library_errors
from llava.records import atomic_path
from llava.train.data.kept_files import kept_path

_AMBIGUOUS = np.iinfo(np.uint64).max
"""In place of a shard's number: several members end with this name."""


class Place(NamedTuple):
    """A member's content: `size` bytes of `shard` from `offset`."""

    shard: Path
    offset: int
    size: int


class TarIndex:
    """Members by full name, or by the name's last part where only one member has it.

    The index is made by reading all headers once, and kept next to the first shard (or in `output_dir`).

    Raises:
        LlavaError: a shard isn't an uncompressed tar file, or two shards have a member of the same name.
    """

    def __init__(self, shards: Sequence[Path], output_dir: Path):
        self.shards = list(shards)
        stats = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
        self._path = kept_path(self.shards[0], output_dir, "members.npy", {"shards": stats})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_name(self._path.name + ".lock")):
            if not self._path.is_file():
                with atomic_path(self._path) as temporary, temporary.open("wb") as file:
                    np.save(file, _index(self.shards))
        self._table = np.load(self._path, mmap_mode="r")

    def find(self, name: str) -> Place | None:
        """Where the member is; None if there is none.

        Raises:
            LlavaError: only the last part of a name is given, and several members have it.
        """
        first, second = _digest(name)
        firsts = self._table[0]
        # As Python's integer numpy would cast the whole table to float64, which is slow and tells fewer digests apart.
        place = int(np.searchsorted(firsts, np.uint64(first)))
        while place < len(firsts) and firsts[place] == first:
            if self._table[1, place] == second:
                shard, offset, size = (int(value) for value in self._table[2:, place])
                if shard == _AMBIGUOUS:
                    raise LlavaError(f"several members of the tar files are called {name}; name its folder too")
                return Place(self.shards[shard], offset, size)
            place += 1
        return None

    def __reduce__(self):
        # Worker processes map the file themselves.
        return _reopened, (self.shards, self._path)


def _reopened(shards: list[Path], path: Path) -> TarIndex:
    index = TarIndex.__new__(TarIndex)
    index.shards, index._path, index._table = shards, path, np.load(path, mmap_mode="r")
    return index


def _index(shards: Sequence[Path]) -> np.ndarray:
    """uint64 `[5, names]`, sorted: two halves of the name's digest, shard, offset, size."""
    whole, last = [], []
    for number, shard in enumerate(tqdm(shards, desc="indexing tar files", unit=" file", delay=2)):
        members = _members(shard)
        whole.append(_rows((name, number, *place) for name, place in members.items()))
        last.append(_rows((name.rpartition("/")[2], number, *place) for name, place in members.items() if "/" in name))
    names = _sorted(np.concatenate(whole))
    if (repeated := np.flatnonzero(_as_before(names)[1:])).size:
        where = sorted({shards[int(names[place + more, 2])].name for place in repeated[:1] for more in (0, 1)})
        count = amount(len(repeated), "member is", "members are")
        raise LlavaError(f"{count} in two tar files, one of them in {' and '.join(where)}")
    parts = _sorted(np.concatenate(last))
    again = _as_before(parts)
    parts[:-1, 2][again[1:]] = _AMBIGUOUS
    # The sort keeps the order of equals: a full name comes before the last part of another.
    both = _sorted(np.concatenate([names, parts[~again]]))
    return both[~_as_before(both)].T.copy()


def _rows(members: Iterable[tuple[str, int, int, int]]) -> np.ndarray:
    rows = [(*_digest(name), shard, offset, size) for name, shard, offset, size in members]
    return np.array(rows, np.uint64).reshape(-1, 5)


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def _as_before(rows: np.ndarray) -> np.ndarray:
    """bool `[rows]`: whether a row has the same name as the one before it."""
    return np.concatenate([[False], (rows[1:, :2] == rows[:-1, :2]).all(1)])[: len(rows)]


def _members(shard: Path) -> dict[str, tuple[int, int]]:
    """{name: (offset, size)} of regular files; of two with one name the later, as tar means it."""
    members: dict[str, tuple[int, int]] = {}
    end = shard.stat().st_size
    # tarfile itself has more kinds of errors for damaged headers than its own.
    with library_errors(f"{shard}: not an uncompressed tar file"), tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.isfile():
                if member.issparse() or not 0 <= member.size <= end - member.offset_data:
                    raise LlavaError(f"{shard}: {member.name} in it is sparse or of a wrong size; pack it anew")
                members[member.name.removeprefix("./")] = member.offset_data, member.size
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
    return members


def _digest(name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
