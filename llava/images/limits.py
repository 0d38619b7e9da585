"""What an image may cost: checked from sizes that headers state, before anything is decoded."""

from dataclasses import dataclass

from llava.errors import LlavaError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
"""Pillow's decoders that may run; every further one is code that strangers' bytes could reach."""


@dataclass(frozen=True)
class Limits:
    """Caps on one image; an image beyond one of them is an error, not a warning."""

    max_bytes: int = 1 << 30
    """Of the file as it is."""
    max_pixels: int = 178_956_970
    """Of the decoded frame (Pillow's own error threshold; it can't be set higher)."""
    max_side: int = 100_000
    max_aspect: float = 10_000.0
    """Longer side over shorter side."""
    max_volume_bytes: int = 4 << 30
    """Of a decompressed volume (NIfTI) or of all frames of a DICOM file."""
    formats: tuple[str, ...] = FORMATS

    def check_bytes(self, size: int, name: str) -> None:
        if size > self.max_bytes:
            raise LlavaError(
                f"{name}: {size / 2**20:.1f} MiB is more than the {self.max_bytes / 2**20:.1f} MiB allowed "
                f"for an image; send a smaller one"
            )

    def check_size(self, width: int, height: int, name: str) -> None:
        if width < 1 or height < 1:
            raise LlavaError(f"{name}: the image is empty ({width} × {height} pixels)")
        longer, shorter = max(width, height), min(width, height)
        if width * height > self.max_pixels or longer > self.max_side or longer > self.max_aspect * shorter:
            raise LlavaError(
                f"{name}: {width} × {height} pixels is beyond what is allowed ({self.max_pixels:,} pixels, "
                f"{self.max_side:,} per side, {self.max_aspect:g} times as long as wide); send a smaller image"
            )

    def check_volume(self, size: int, name: str) -> None:
        if size > self.max_volume_bytes:
            raise LlavaError(
                f"{name}: holds {size / 2**20:.0f} MiB of pixels, more than the "
                f"{self.max_volume_bytes / 2**20:.0f} MiB allowed; send a single frame or slice"
            )


UPLOAD_LIMITS = Limits(
    max_bytes=32 << 20, max_pixels=50_000_000, max_side=20_000, max_aspect=1_000.0, max_volume_bytes=512 << 20
)
"""For images that strangers send."""
