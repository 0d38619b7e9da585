"""What is in an image file, and what of it would be shown: sizes, windows, directions. Never who it is of.

Only the fields named here are read out of a file; free texts (descriptions, names, comments) are not among them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class ImageFacts:
    """`shown` and the notes are sentences; everything else is a number or a word of a fixed list."""

    kind: str
    """PNG, JPEG, …, DICOM or NIfTI."""
    width: int
    height: int
    frames: int = 1
    """Frames of a file of several, or slices along the axis that is shown. Of a GIF, TIFF, WebP or PNG no more than
    1,000 are counted; 1,001 stands for any number beyond."""
    frame: int = 0
    """Which of them is shown."""
    stored: str = ""
    """How the pixels are stored: mode, bits, transfer syntax."""
    window: tuple[float, float] | None = None
    """(centre, width) that is shown, if it is one."""
    values: tuple[float, float] | None = None
    """The least and the largest grey value of what is shown, in the units that windows are given in."""
    orientation: str | None = None
    """`axial`, `coronal`, `sagittal`, `oblique` for a slice; an EXIF orientation for a photograph."""
    spacing_mm: tuple[float, ...] | None = None
    """Between rows, columns and, where known, slices."""
    position_mm: tuple[float, ...] | None = None
    """Of the first pixel in the patient."""
    modality: str | None = None
    shown: list[str] = field(default_factory=list)
    """What the model would see, and why."""

    def note_proportions(self) -> None:
        """Says in `shown` that the image isn't as high or as wide as what it is of; a hundredth isn't told."""
        high, wide = self.spacing_mm[:2] if self.spacing_mm else (1.0, 1.0)
        if min(high, wide) > 0 and max(high, wide) > 1.01 * min(high, wide):
            more, which = (high / wide, "high") if high > wide else (wide / high, "wide")
            self.shown.append(f"not stretched: in the patient it is {more:.3g} times as {which} as here")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plane_of(row: np.ndarray, column: np.ndarray) -> str:
    """The plane of a slice whose rows and columns run along these directions (patient coordinates)."""
    normal = np.abs(np.cross(row, column))
    if not np.isfinite(normal).all() or not normal.any():
        return "unknown"
    normal /= np.linalg.norm(normal)
    # Within about 8 degrees of an axis.
    return ("sagittal", "coronal", "axial")[int(normal.argmax())] if normal.max() > 0.99 else "oblique"
