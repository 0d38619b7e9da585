"""What an image may cost: checked from sizes that headers state, before anything is decoded."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from llava.errors import ImageError, LlavaError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
"""Pillow's decoders that may run; every further one is code that untrusted bytes could reach."""


@dataclass(frozen=True)
class Limits:
    """Caps on one image; an image beyond one of them is an error, not a warning.

    The defaults keep any image under 5 seconds of one core and 1.5 GB of memory (tests/security/test_image_bombs.py).
    """

    max_bytes: int = 768 << 20
    """Of the file as it is (of NIfTI files, `max_volume_bytes`), and of a deflated DICOM file once it is unpacked."""
    max_pixels: int = 100_000_000
    """Of the decoded frame, where a pixel costs what one of a plain JPEG does; codecs that take more count more."""
    max_side: int = 100_000
    max_aspect: float = 10_000.0
    """Longer side over shorter side."""
    max_volume_bytes: int = 4 << 30
    """Of a volume (NIfTI) or of all frames of a DICOM file, decompressed."""
    max_unpacked_bytes: int = 1 << 30
    """Of a compressed volume, as far as it has to be unpacked to reach the slice."""
    formats: tuple[str, ...] = FORMATS

    def check_bytes(self, size: int, name: str) -> None:
        if size > self.max_bytes:
            raise ImageError(
                f"{name}: {size / 2**20:.1f} MiB is more than the {self.max_bytes / 2**20:.1f} MiB allowed "
                f"for an image; send a smaller one"
            )

    def check_size(self, width: int, height: int, name: str, cost: float = 1.0) -> None:
        """`cost`: of a pixel, in time or memory, against one of a plain JPEG."""
        if width < 1 or height < 1:
            raise ImageError(f"{name}: the image is empty ({width} × {height} pixels)")
        longer, shorter = max(width, height), min(width, height)
        pixels = int(self.max_pixels / cost)
        if width * height > pixels or longer > self.max_side or longer > self.max_aspect * shorter:
            raise ImageError(
                f"{name}: {width} × {height} pixels is beyond what is allowed for an image of this kind "
                f"({pixels:,} pixels, {self.max_side:,} per side, {self.max_aspect:g} times as long as wide); "
                f"send a smaller image"
            )

    def check_volume(self, size: int, name: str) -> None:
        if size > self.max_volume_bytes:
            raise ImageError(
                f"{name}: holds {size / 2**20:.0f} MiB of pixels, more than the "
                f"{self.max_volume_bytes / 2**20:.0f} MiB allowed; send a single frame or slice"
            )

    def check_unpacked(self, size: int, name: str) -> None:
        if size > self.max_unpacked_bytes:
            raise ImageError(
                f"{name}: {size / 2**20:.0f} MiB would have to be unpacked, more than the "
                f"{self.max_unpacked_bytes / 2**20:.0f} MiB allowed; send it uncompressed, or a single slice"
            )


UPLOAD_LIMITS = Limits(
    max_bytes=32 << 20,
    max_pixels=64_000_000,
    max_side=20_000,
    max_aspect=1_000.0,
    max_volume_bytes=1 << 30,
    max_unpacked_bytes=512 << 20,
)
"""For untrusted images."""


@contextlib.contextmanager
def plain_errors(name: str, words: str) -> Iterator[None]:
    """Whatever a library raises within becomes an ImageError in our own words: a decoder's text can hold memory
    addresses, bytes of the file or a patient's data, so it isn't chained either."""
    try:
        yield
    except LlavaError:
        raise
    except MemoryError:
        raise ImageError(f"{name}: the image needs more memory than there is") from None
    except Exception as error:  # noqa: BLE001 - a decoder may raise anything
        raise ImageError(f"{name}: {words} ({type(error).__name__})") from None
