"""Lengths of all samples, counted once without decoding an image and kept next to the data."""

import logging
from pathlib import Path

import numpy as np

from llava.records import atomic_path

logger = logging.getLogger(__name__)


def load_lengths(path: Path, count: int) -> np.ndarray | None:
    """int32 [count], negative for samples without an image; None if they aren't kept there."""
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
