"""The frozen tower's output, once per distinct image: a file of features, read by row.

The folder's name is made from what the features depend on (tower, layer, preprocessing), so runs that agree
share it, and a changed tower never meets old features.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from llava.bars import tqdm
from llava.record_content import image_key
from llava.records import atomic_path, read_json, write_json

logger = logging.getLogger(__name__)

_INDEX = "index.json"
_FEATURES = "features.npy"
_IN_MEMORY_BYTES = 1 << 30


class FeatureCache:
    """Features `[images, patches, mm_hidden]`, float32 or bfloat16, by row; in memory up to 1 GB, else mapped.

    `row(image)` is the row of a record's image, for the images that the cache was opened with.
    """

    def __init__(self, folder: Path, keys: dict[str, str]):
        """`keys`: {the image's name in the records: its key in the folder's index}."""
        index = read_json(folder / _INDEX)
        self.stored: dict[str, int] = index["rows"]
        self.bfloat16 = index["dtype"] == "bfloat16"
        self._rows = {name: self.stored[key] for name, key in keys.items() if key in self.stored}
        features = np.load(folder / _FEATURES, mmap_mode="r")
        self.features = np.array(features) if features.nbytes <= _IN_MEMORY_BYTES else features

    def row(self, image: Any) -> int:
        return self._rows[image_key(image)]

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        """Features of these rows, `[len(rows), patches, mm_hidden]`."""
        features = torch.from_numpy(self.features[np.asarray(rows, np.int64)])
        return features.view(torch.bfloat16) if self.bfloat16 else features


def fingerprint(tower: torch.nn.Module, **settings: Any) -> str:
    """A name for what features depend on: the tower's weights and the settings of the images."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in tower.state_dict().items():
        digest.update(name.encode())
        # A strided sample tells towers apart; hashing 300 million weights would take seconds.
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy()
        digest.update(sample.tobytes() + str(tuple(value.shape)).encode())
    return digest.hexdigest()[:16]


def build_feature_cache(
    folder: Path,
    images: dict[str, tuple[int, Any]],
    identify: Callable[[int, Any], str],
    load: Callable[[int, Any], np.ndarray],
    tower: torch.nn.Module,
    *,
    bfloat16: bool = False,
    batch_size: int = 64,
    show_progress: bool = True,
) -> FeatureCache:
    """Compute what `folder` doesn't hold yet, and open it. One process computes; others that want the same wait.

    Args:
        images: {name: (record number, image)} of the images that are needed.
        identify: `identify(record number, image)` -> key that changes when the image does; raises where there is none.
        load: `load(record number, image) -> float32 [1, 3, H, W]`; raises on an image that can't be read.
        tower: the frozen tower; it runs where its weights are.
    """
    keys = {name: identify(*place) for name, place in images.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        old = FeatureCache(folder, keys) if (folder / _INDEX).is_file() else None
        # Two names may stand for one image; it is computed once.
        missing = {key: images[name] for name, key in keys.items() if old is None or key not in old.stored}
        if missing:
            chunks = _computed(missing, load, tower, bfloat16, batch_size, show_progress)
            _write(folder, old, list(missing), chunks, bfloat16)
    return FeatureCache(folder, keys)


def _computed(missing, load, tower, bfloat16: bool, batch_size: int, show_progress: bool) -> Iterator[np.ndarray]:
    """The features of a batch after the other: all of them may be more than memory holds."""
    device = next(tower.parameters()).device
    pending = list(missing.values())
    with tqdm(total=len(pending), desc="vision features", unit="image", disable=not show_progress) as progress:
        for start in range(0, len(pending), batch_size):
            pixels = np.concatenate([load(*place) for place in pending[start : start + batch_size]])
            with torch.inference_mode():
                features = tower(torch.from_numpy(pixels).to(device))
                features = features.to("cpu", torch.bfloat16 if bfloat16 else torch.float32)
                found = (features.view(torch.int16) if bfloat16 else features).numpy()
            yield found
            progress.update(len(pixels))


def _write(
    folder: Path, old: FeatureCache | None, keys: list[str], chunks: Iterator[np.ndarray], bfloat16: bool
) -> None:
    """Old and new features in one file; rows never move, so the older index stays right until the new one is there."""
    rows = dict(old.stored) if old else {}
    first = len(rows)
    # A run that was killed before it wrote the index has left rows that nobody knows.
    known = [old.features[:first]] if old else []
    one = next(chunks)
    shape = (first + len(keys), *one.shape[1:])
    with atomic_path(folder / _FEATURES) as temporary:
        target = np.lib.format.open_memmap(temporary, mode="w+", dtype=one.dtype, shape=shape)
        position = 0
        for part in chain(known, [one], chunks):
            target[position : position + len(part)] = part
            position += len(part)
        target.flush()
    rows.update({key: first + number for number, key in enumerate(keys)})
    write_json(folder / _INDEX, {"dtype": "bfloat16" if bfloat16 else "float32", "rows": rows}, indent=None)
