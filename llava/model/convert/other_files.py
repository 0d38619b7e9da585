"""The files of a model folder other than its weights, and copying them from one folder to another."""

import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

SIDE_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
"""Configuration, tokenizer, image processor, chat template, licence. `README.md` is written anew for each result."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")

_NEVER = ("*.index.json", "adapter_config.json", "trainer_state.json", "manifest.json", "training_*.json")
"""Also what a training run says of itself: it holds paths of the machine and names of records."""


def find_generation_config(folders: Iterable[Path]) -> Path | None:
    """The first generation_config.json of a checkpoint's folders: its own, else its base's."""
    return next((path for folder in folders if (path := folder / "generation_config.json").is_file()), None)


def copy_side_files(source: Path, target: Path, only: Iterable[str] = SIDE_FILES) -> list[str]:
    """Copy configuration and tokenizer files; returns their names. Weights stay where they are."""
    only = tuple(only)
    copied = []
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in only)
        if path.is_file() and wanted and not any(fnmatch(path.name, pattern) for pattern in _NEVER):
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    return copied
