"""The numbers of the LLaVA-Med paper and of its released weights, to compare with ours.

docs/llava_med_performance.md explains them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PublishedRow:
    """Open recall and closed accuracy in percent, by the *paper* set's definitions."""

    model: str
    open: float
    closed: float


DATASET_NAMES = {"vqa-rad": "VQA-RAD", "slake": "SLAKE (English)", "pathvqa": "PathVQA"}

TEST_COUNTS = {"vqa-rad": (179, 272), "slake": (645, 416), "pathvqa": (3370, 3391)}
"""Open and closed questions of the test splits that the paper used."""

PUBLISHED = {
    "vqa-rad": (
        PublishedRow("LLaVA (general), 3 epochs", 50.00, 65.07),
        PublishedRow("LLaVA-Med from LLaVA, 15 epochs", 61.52, 84.19),
        PublishedRow("LLaVA-Med from Vicuna", 64.39, 81.98),
        PublishedRow("LLaVA-Med, BiomedCLIP tower, 9 epochs", 64.75, 83.09),
        PublishedRow("released weights, 9 epochs", 66.26, 80.88),
        PublishedRow("released weights, original split", 31.03, 64.71),
        PublishedRow("LLaVA-Med zero-shot", 28.23, 61.40),
    ),
    "slake": (
        PublishedRow("LLaVA (general), 3 epochs", 78.18, 63.22),
        PublishedRow("LLaVA-Med from LLaVA, 15 epochs", 83.08, 85.34),
        PublishedRow("LLaVA-Med from Vicuna", 84.71, 83.17),
        PublishedRow("LLaVA-Med, BiomedCLIP tower, 9 epochs", 87.11, 86.78),
        PublishedRow("released weights, 9 epochs", 82.30, 84.86),
        PublishedRow("LLaVA-Med zero-shot", 39.17, 52.16),
    ),
    "pathvqa": (
        PublishedRow("LLaVA (general), 3 epochs", 7.74, 63.20),
        PublishedRow("LLaVA-Med from LLaVA, 15 epochs", 37.95, 91.21),
        PublishedRow("LLaVA-Med from Vicuna", 38.87, 91.65),
        PublishedRow("LLaVA-Med, BiomedCLIP tower, 9 epochs", 39.60, 91.09),
        PublishedRow("released weights, 9 epochs", 37.59, 91.54),
        PublishedRow("LLaVA-Med zero-shot", 12.30, 54.05),
    ),
}

_PATH_PARTS = {
    "vqa-rad": ("vqa_rad", "vqa-rad", "data_rad"),
    "slake": ("slake",),
    "pathvqa": ("pvqa", "pathvqa", "path_vqa"),
}


def recognise_dataset(gt: str | Path, manifest: dict[str, Any] | None = None) -> str | None:
    """Which of the three sets a file of questions is of: by its converter's manifest, else by its path."""
    if manifest and manifest.get("data_set"):
        return manifest["data_set"] if manifest["data_set"] in PUBLISHED else None
    text = str(Path(gt).resolve()).lower()
    return next((name for name, parts in _PATH_PARTS.items() if any(part in text for part in parts)), None)
