"""Lengths of all samples, counted once without opening a picture and kept beside the data."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from llava.records import atomic_path

logger = logging.getLogger(__name__)


def cache_path(data_path: Path, output_dir: Path, settings: dict[str, Any]) -> Path:
    """Where the lengths of this file under these settings are kept: beside it, or in `output_dir` if that can't be.

    The name changes with the file's size and time and with whatever `settings` hold (tokenizer, template, …).
    """
    status = data_path.stat()
    text = repr((sorted(settings.items()), status.st_size, status.st_mtime_ns))
    name = f".{data_path.name}.lengths-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npy"
    folder = data_path.parent if os.access(data_path.parent, os.W_OK) else output_dir
    return folder / name


def load_lengths(path: Path, count: int) -> np.ndarray | None:
    """int32 [count], negative for samples without a picture; None if they aren't kept there."""
    if not path.is_file():
        return None
    try:
        lengths = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        logger.warning("%s can't be read (%s); counting anew", path, error)
        return None
    return lengths if len(lengths) == count else None


def save_lengths(path: Path, lengths: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, lengths.astype(np.int32))
