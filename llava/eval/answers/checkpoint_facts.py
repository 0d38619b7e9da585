"""What a manifest says of a checkpoint: a digest that tells two apart, and how long it was trained."""

import hashlib
from pathlib import Path
from typing import Any

from llava.records import read_json

_WEIGHTS = ("*.safetensors", "*.bin")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
_MOST_EPOCHS = 1e9
"""What a stranger's file says beyond is no number of epochs."""


def checkpoint_facts(path: str | Path) -> dict[str, Any]:
    """`checkpoint_digest` and `training_epochs` of a folder; both None for a hub id."""
    folder = Path(path)
    if not folder.is_dir():
        return {"checkpoint_digest": None, "training_epochs": None}
    return {"checkpoint_digest": _digest(folder), "training_epochs": _epochs(folder)}


def _digest(folder: Path) -> str:
    """Of the config and of samples of every weight file: reading 14 GB for a name would take longer than it says."""
    digest = hashlib.sha256()
    config = folder / "config.json"
    files = [config, *sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))]
    for path in filter(Path.is_file, files):  # a pipe may never hold anything
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _epochs(folder: Path) -> float | None:
    for name, key in (("training_summary.json", "epochs"), ("trainer_state.json", "epoch")):
        if (folder / name).is_file():
            content = read_json(folder / name)
            epochs = _find(content, key)
            if isinstance(epochs, int | float) and 0 <= epochs < _MOST_EPOCHS:
                return round(float(epochs), 4)
    return None


def _find(content: Any, key: str) -> Any:
    """The value of `key` at the top or one level below."""
    if not isinstance(content, dict):
        return None
    if content.get(key) is not None:
        return content[key]
    return next((part[key] for part in content.values() if isinstance(part, dict) and part.get(key) is not None), None)
